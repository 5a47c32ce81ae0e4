"""Tokenise a source once, and let every rank of a machine map the result from the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from filelock import FileLock, Timeout

from moedist.config.schema import DataConfig
from moedist.data.embedded import source_files
from moedist.data.files import list_files
from moedist.data.sources import read_documents, source_splits
from moedist.data.splits import SPLITS
from moedist.data.token_file import open_tokens, write_tokens
from moedist.data.tokenizer import Tokenizer
from moedist.errors import DataError

FORMAT = 1  # raise it when what is written for the same configuration changes
META = "corpus.json"


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: memory maps of token ids [tokens], one end-of-text id after every document.

    Attributes:
        tokenizer: what made the ids.
        train: never empty.
        valid: None only where the source has no such split and `data.valid_fraction` is 0.
        test: None where the source has none.
        digest: sha256 of all ids and the vocabulary. Ranks with the same digest train on the same text.
        folder: where it lies in the cache.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    valid: np.ndarray | None
    test: np.ndarray | None
    digest: str
    folder: Path


def prepare_corpus(config: DataConfig) -> Corpus:
    """Tokenise the source, unless the cache has it, and map it.

    The cache folder is `data.cache`, else $MOEDIST_CACHE, else ~/.cache/moedist. Any number of processes may call this
    at once: one builds, the others wait. What is found in the cache is never checked against the Hub again.

    Raises:
        DataError: the source cannot be read or is empty, the tokenizer cannot be made, or the cache is not writable.
    """
    key = cache_key(config)
    root = cache_folder(config)
    folder = root / key
    if not (folder / META).is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{key}.lock", config):
                if not (folder / META).is_file():  # another process may have built it while this one waited
                    _build(config, folder)
        except OSError as error:
            raise DataError(f"cannot write the token cache {root}: {error}; set data.cache=FOLDER or MOEDIST_CACHE "
                            "to a folder with room") from error
    return open_corpus(folder)


def open_corpus(folder: str | os.PathLike) -> Corpus:
    """Map a corpus that `prepare_corpus` has written.

    Raises:
        DataError: the folder holds no whole corpus.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        maps = {split: open_tokens(folder / f"{split}.npy") for split in meta["tokens"]}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} holds no whole corpus ({error}); delete it and start again") from error
    return Corpus(tokenizer=Tokenizer.load(folder), digest=meta["digest"], folder=folder,
                  **{split: maps.get(split) for split in SPLITS})


def cache_folder(config: DataConfig) -> Path:
    """`data.cache`, else $MOEDIST_CACHE, else ~/.cache/moedist."""
    return Path(config.cache or os.environ.get("MOEDIST_CACHE") or "~/.cache/moedist").expanduser().absolute()


def cache_key(config: DataConfig) -> str:
    """A hash of everything that the token files depend on: 16 hexadecimal digits.

    Local files count with name, size and time of change; a Hub dataset with its name, so that a cached one needs no
    network; the embedded corpus with the Python version and its files.

    Raises:
        DataError: `data.path` or the tokenizer file does not exist.
    """
    facts: dict[str, Any] = {"format": FORMAT, "source": config.source, "max_documents": config.max_documents,
                             "valid_fraction": config.valid_fraction, "tokenizer": config.tokenizer}
    if config.source == "embedded":
        facts["python"] = sys.version
        facts["files"] = [(name, file.stat().st_size) for name, file in source_files()]
    elif config.path:
        facts.update(path=config.path, name=config.name, text_field=config.text_field)
        if config.source == "files" or os.path.isdir(config.path):
            facts["path"] = os.path.realpath(os.path.expanduser(config.path))
            facts["files"] = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
                              for file in list_files(config.path)]
    if config.tokenizer == "bpe":
        facts.update(vocab=config.vocab, library=tokenizers.__version__)
    elif config.tokenizer != "byte" and os.path.isfile(config.tokenizer):
        facts["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration; `bpe` is trained on the train split.

    Raises:
        DataError: vocabulary too small, or no tokenizer in that file.
    """
    if config.tokenizer == "byte":
        return Tokenizer.byte()
    if config.tokenizer == "bpe":
        return Tokenizer.train_bpe(read_documents(config, "train"), config.vocab)
    return Tokenizer.from_file(config.tokenizer)


def _build(config: DataConfig, folder: Path) -> None:
    """Write tokenizer, tokens and digest beside the final place, then move the whole folder there at once."""
    start = time.perf_counter()
    _say(f"tokenising {_describe(config)} into {folder} (once; later runs map it)")
    for stale in folder.parent.glob(f"{folder.name}.part-*"):  # a build that was killed; a day old, so not a live one
        if time.time() - stale.stat().st_mtime > 86_400:
            shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    temporary.chmod(0o755)  # mkdtemp makes it private, but a group's cache is shared
    try:
        tokenizer = make_tokenizer(config)
        tokenizer.save(temporary)
        digest = hashlib.sha256(json.dumps([tokenizer.eos_id, tokenizer.vocabulary()]).encode())
        tokens: dict[str, int] = {}
        for split in source_splits(config):
            digest.update(split.encode())
            parts = _hashed(tokenizer.encode_batches(read_documents(config, split)), digest)
            tokens[split] = write_tokens(temporary / f"{split}.npy", tokenizer.dtype, parts)
            if not tokens[split]:
                raise DataError(f"the {split} split of {_describe(config)} is empty; {_way_out(config, split)}")
        meta = {"digest": digest.hexdigest(), "tokens": tokens, "vocab_size": tokenizer.vocab_size}
        (temporary / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / META).is_file():  # else: a machine that shares the cache, but not its locks, was faster
                raise
        counts = ", ".join(f"{split} {count:,}" for split, count in tokens.items())
        _say(f"tokenised in {time.perf_counter() - start:.1f} s: {counts} tokens, vocabulary {tokenizer.vocab_size}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hashed(parts: Iterable[np.ndarray], digest: Any) -> Iterator[np.ndarray]:
    for part in parts:
        digest.update(part.tobytes())
        yield part


@contextmanager
def _locked(path: Path, config: DataConfig) -> Iterator[None]:
    """Hold the lock of one corpus; the operating system lets go of it should this process die."""
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that tokenises {_describe(config)}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _describe(config: DataConfig) -> str:
    where = [config.source, config.path, config.name] if config.source != "embedded" else [config.source]
    limit = [f"first {config.max_documents} documents"] if config.max_documents else []
    kind = f"bpe {config.vocab}" if config.tokenizer == "bpe" else config.tokenizer
    return ", ".join([*(part for part in where if part), *limit, f"tokenizer {kind}"])


def _way_out(config: DataConfig, split: str) -> str:
    if split == "valid":
        return "give more text, raise data.valid_fraction, or add a file named valid"
    return "give a source with text in it, or use data.source=embedded"


def _say(line: str) -> None:
    print(f"data: {line}", file=sys.stderr, flush=True)
