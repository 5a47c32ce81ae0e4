"""Tokenised once, by one of many processes, into memory maps that carry a digest."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from moedist.config.schema import DataConfig
from moedist.data import corpus as module
from moedist.data.corpus import cache_folder, cache_key, open_corpus, prepare_corpus
from moedist.data.sources import read_documents
from moedist.errors import DataError

PREPARE = """
import sys
from moedist.config.schema import DataConfig
from moedist.data import prepare_corpus
corpus = prepare_corpus(DataConfig(cache=sys.argv[1], vocab=600, max_documents=200))
print(corpus.digest, len(corpus.train), corpus.folder)
"""


@pytest.fixture
def config(tmp_path):
    """A small part of the embedded corpus, cached where no other test looks."""
    return DataConfig(cache=str(tmp_path / "cache"), vocab=500, max_documents=20)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text("some training text\n" * 50)
    (folder / "valid.txt").write_text("some other text\n" * 5)
    return folder


def test_tokens_are_the_documents(config):
    corpus = prepare_corpus(config)
    for split in ("train", "valid", "test"):
        ids = getattr(corpus, split)
        assert isinstance(ids, np.memmap)
        assert ids.dtype == np.uint16
        documents = list(read_documents(config, split))
        assert corpus.tokenizer.decode(ids) == "".join(documents)
        assert int((ids == corpus.tokenizer.eos_id).sum()) == len(documents)


def test_second_call_maps_what_the_first_built(config, monkeypatch, capsys):
    first = prepare_corpus(config)
    assert "tokenised in" in capsys.readouterr().err
    monkeypatch.setattr(module, "_build", None)  # would fail
    second = prepare_corpus(config)
    assert capsys.readouterr().err == ""
    assert (second.digest, second.folder) == (first.digest, first.folder)
    assert open_corpus(first.folder).digest == first.digest


def test_three_processes_build_once(tmp_path):
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("tokenised in" in err for _, err in results) == 1
    assert len([entry for entry in os.listdir(tmp_path) if not entry.endswith(".lock")]) == 1  # no part left


def test_digest_depends_on_text_and_tokenizer_only(config, tmp_path, texts):
    digests = [prepare_corpus(c).digest for c in (
        config, replace(config, cache=str(tmp_path / "elsewhere")), replace(config, vocab=501),
        replace(config, tokenizer="byte"), replace(config, max_documents=21))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_key_follows_everything_that_matters(config, texts):
    files = replace(config, source="files", path=str(texts))
    same = [replace(config, sequence_length=9), replace(config, cache="x"), replace(config, streaming=True)]
    assert {cache_key(c) for c in same} == {cache_key(config)}
    other = [config, files, replace(config, vocab=501), replace(config, tokenizer="byte"),
             replace(config, max_documents=None), replace(config, valid_fraction=0.1), replace(files, text_field="x"),
             replace(config, source="hub", path="a/b"), replace(config, source="hub", path="a/b", name="c")]
    keys = {cache_key(c) for c in other}
    assert len(keys) == len(other)
    (texts / "valid.txt").write_text("changed")
    assert cache_key(files) not in keys
    assert cache_key(replace(config, tokenizer="byte", vocab=1)) == cache_key(replace(config, tokenizer="byte"))


def test_files_without_test_split_and_an_existing_tokenizer(config, texts):
    trained = prepare_corpus(config)
    files = replace(config, source="files", path=str(texts), tokenizer=str(trained.folder / "tokenizer.json"))
    corpus = prepare_corpus(files)
    assert corpus.test is None
    assert corpus.tokenizer.vocabulary() == trained.tokenizer.vocabulary()
    assert corpus.tokenizer.decode(corpus.valid) == (texts / "valid.txt").read_text()
    byte = prepare_corpus(replace(files, tokenizer="byte", valid_fraction=0.0))
    assert len(byte.valid) == (texts / "valid.txt").stat().st_size + 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEDIST_CACHE", raising=False)
    assert cache_folder(DataConfig()).parts[-2:] == (".cache", "moedist")
    monkeypatch.setenv("MOEDIST_CACHE", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path
    assert cache_folder(DataConfig(cache=str(tmp_path / "c"))) == tmp_path / "c"


def test_a_failed_build_leaves_nothing(config, monkeypatch, texts):
    (texts / "train.txt").write_text("  \n\n")
    with pytest.raises(DataError, match="the train split of files.* is empty; give a source with text") as error:
        prepare_corpus(replace(config, source="files", path=str(texts)))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(module, "write_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_corpus(config)
    assert [entry for entry in os.listdir(config.cache) if not entry.endswith(".lock")] == []
    monkeypatch.undo()
    assert len(prepare_corpus(config).train)  # the lock is free again


def test_unwritable_cache_and_damaged_corpus(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the token cache.*data.cache=FOLDER"):
        prepare_corpus(replace(config, cache=str(tmp_path / "file")))
    folder = prepare_corpus(config).folder
    (folder / "train.npy").unlink()
    with pytest.raises(DataError, match="holds no whole corpus.*delete it"):
        prepare_corpus(config)
