"""Text to token ids and back: bytes, a byte-level BPE trained here, or a tokenizer.json that exists already.

All kinds are a `tokenizers` model, so a run's `tokenizer.json` opens in other tools. Encoding works on batches in the
library's own threads; one end-of-text token follows every document. A foreign tokenizer that starts its texts with a token
of its own (Llama's `<s>`) does so here too, since models trained with it expect it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from moedist.errors import DataError

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
BYTE_VOCAB = 257  # 256 bytes and the end of text
PIECE_CHARS = 16_384  # longest text that goes to one thread
BATCH_CHARS = 8_000_000  # text encoded at once: bounds memory, enough for every thread
MAX_TRAIN_CHARS = 200_000_000  # counts of frequent pairs no longer change beyond this much text
FILE, SETTINGS = "tokenizer.json", "tokenizer_settings.json"
FOREIGN_SETTINGS = "tokenizer_config.json"  # what Hugging Face keeps beside a tokenizer.json

# Where it is not set, the library warns at every fork (a logger, a compiler) that it turns its threads off.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Tokenizer:
    """A tokenizer with one end-of-text id. Make one with `byte`, `train_bpe`, `from_file` or `load`.

    `kind` is byte, bpe or file. `byte` and `bpe` give back any Unicode text exactly (half surrogate pairs, which are
    no text, become `?`). A text that spells out the end-of-text token is encoded as ordinary characters.
    """

    def __init__(self, library: LibraryTokenizer, kind: str, end: str):
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # text from the outside must not end a document
        self._library = library
        self.end = end
        self.kind = kind
        self.vocab_size: int = max(library.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self.eos_id: int = library.token_to_id(end)
        self._begin = _first_ids(library, self.eos_id)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @classmethod
    def byte(cls) -> Tokenizer:
        """Token i is byte i, 256 is the end of text; nothing is trained."""
        model = models.BPE(vocab={char: i for i, char in enumerate(_byte_chars())}, merges=[])
        library = _byte_level(model, regex=False)
        library.add_special_tokens([END_OF_TEXT])
        return cls(library, "byte", END_OF_TEXT)

    @classmethod
    def train_bpe(cls, documents: Iterable[str], vocab: int) -> Tokenizer:
        """Train a byte-level BPE (GPT-2's word splitting) on at most 200 million characters; the same text gives the
        same tokenizer. A small text may give fewer than `vocab` tokens.

        Raises:
            DataError: `vocab` has no room for the 256 bytes and the end of text.
        """
        if vocab < BYTE_VOCAB:
            raise DataError(f"data.vocab={vocab} is too small: a bpe tokenizer needs {BYTE_VOCAB} tokens, for the 256 "
                            f"bytes and the end of text; set data.vocab={BYTE_VOCAB} or more, or data.tokenizer=byte")
        library = _byte_level(models.BPE(), regex=True)
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        library.train_from_iterator(_pieces(_first_chars(documents, MAX_TRAIN_CHARS)), trainer)
        return cls(library, "bpe", END_OF_TEXT)

    @classmethod
    def from_file(cls, path: str) -> Tokenizer:
        """An existing tokenizer.json. Its end-of-text token is the one named beside it, by `save` or in Hugging Face's
        tokenizer_config.json, else the first of the usual ones that it has.

        Raises:
            DataError: no such file, not a tokenizer, or none of the usual end-of-text tokens in it.
        """
        if not os.path.isfile(path):
            raise DataError(f"data.tokenizer={path} is no file; choose byte, bpe or the path of a tokenizer.json")
        library = _read_library(path)
        ends = [token for token in (*_ends_beside(path), *KNOWN_ENDS) if library.token_to_id(token) is not None]
        if not ends:
            raise DataError(f"{path} has no end-of-text token (looked for {', '.join(KNOWN_ENDS)}); add one, "
                            "or use data.tokenizer=bpe")
        return cls(library, "file", ends[0])

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            DataError: the folder holds no saved tokenizer.
        """
        settings = Path(folder, SETTINGS)
        if not settings.is_file():
            raise DataError(f"{folder} holds no {SETTINGS}; give a folder that a tokenizer was saved to")
        values = json.loads(settings.read_text(encoding="utf-8"))
        return cls(_read_library(Path(folder, FILE)), values["kind"], values["end"])

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and its settings into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._library.save(str(Path(folder, FILE)))
        settings = json.dumps({"kind": self.kind, "end": self.end}, indent=1)
        Path(folder, SETTINGS).write_text(settings + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with what the tokenizer puts before every text, without an end-of-text token."""
        return next(self._encode([text]))[:-1].tolist()

    def encode_documents(self, documents: Iterable[str]) -> np.ndarray:
        """The ids of all documents, each followed by the end-of-text id: one array [tokens] of `dtype`."""
        return np.concatenate([np.zeros(0, self.dtype), *self.encode_batches(documents)])

    def encode_batches(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """`encode_documents` in parts of about 8 million characters, so that a corpus need not fit in memory."""
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document)
            if size >= BATCH_CHARS:
                yield np.concatenate(list(self._encode(batch)))
                batch, size = [], 0
        if batch:
            yield np.concatenate(list(self._encode(batch)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; end-of-text tokens are left out, broken UTF-8 becomes U+FFFD."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def vocabulary(self) -> list[tuple[int, str]]:
        """(id, token) of every token, sorted: what two tokenizers must share to mean the same ids."""
        return sorted((i, token) for token, i in self._library.get_vocab(with_added_tokens=True).items())

    def _encode(self, documents: list[str]) -> Iterator[np.ndarray]:
        """One array per document, the end-of-text id included."""
        begin, end = np.array(self._begin, self.dtype), np.array([self.eos_id], self.dtype)
        if self.kind == "byte":
            for document in documents:
                raw = np.frombuffer(document.encode("utf-8", "replace"), np.uint8)
                yield np.concatenate([raw.astype(self.dtype), end])
            return
        # A foreign tokenizer may put a mark at the start of every text, so only our own is given text in pieces.
        limit = PIECE_CHARS if self.kind == "bpe" else None
        pieces = [list(_pieces([document], limit)) for document in documents]
        encode = getattr(self._library, "encode_batch_fast", self._library.encode_batch)
        encoded = iter(encode([piece for parts in pieces for piece in parts], add_special_tokens=False))
        for parts in pieces:
            yield np.concatenate([begin, *(np.array(e.ids, self.dtype) for e in islice(encoded, len(parts))), end])


def _byte_level(model: models.Model, regex: bool) -> LibraryTokenizer:
    library = LibraryTokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    library.decoder = decoders.ByteLevel()
    return library


def _byte_chars() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself if printable, else the next one above 255."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    above = iter(sorted(char for char in alphabet if ord(char) > 255))
    return [chr(byte) if chr(byte) in alphabet else next(above) for byte in range(256)]


def _first_ids(library: LibraryTokenizer, end: int) -> list[int]:
    """The special tokens that a tokenizer's template puts before a text."""
    empty = library.encode("")
    return [i for i, _ in takewhile(lambda pair: pair[1] and pair[0] != end, zip(empty.ids, empty.special_tokens_mask))]


def _ends_beside(path: str) -> list[str]:
    """End-of-text tokens named in the files beside a tokenizer.json, ours first."""
    found = []
    for name, key in ((SETTINGS, "end"), (FOREIGN_SETTINGS, "eos_token")):
        try:
            token = json.loads(Path(path).with_name(name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        token = token.get("content") if isinstance(token, dict) else token  # older files describe the token
        found += [token] if isinstance(token, str) else []
    return found


def _read_library(path: str | os.PathLike) -> LibraryTokenizer:
    try:
        return LibraryTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer that can be read ({error}); write it again with "
                        "tokenizers.Tokenizer.save, or use data.tokenizer=bpe") from error


def _first_chars(documents: Iterable[str], limit: int) -> Iterator[str]:
    for document in documents:
        if limit <= 0:
            return
        yield document
        limit -= len(document)


def _pieces(documents: Iterable[str], limit: int | None = PIECE_CHARS) -> Iterator[str]:
    """Each document in pieces of at most `limit` characters, cut before a line where there is one."""
    for document in documents:
        text = document if document.isascii() else document.encode("utf-8", "replace").decode()
        start = 0
        while limit and len(text) - start > limit:
            cut = text.rfind("\n", start, start + limit) + 1
            end = cut if cut > start else start + limit
            yield text[start:end]
            start = end
        yield text[start:]
