"""Bytes, BPE and foreign tokenizers: lossless, deterministic, with one end of text."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from moedist.config.schema import DataConfig
from moedist.data import tokenizer as module
from moedist.data.sources import read_documents
from moedist.data.tokenizer import Tokenizer
from moedist.errors import DataError

DOCUMENTS = list(read_documents(DataConfig(max_documents=60), "train"))
BYTE = Tokenizer.byte()
BPE = Tokenizer.train_bpe(DOCUMENTS, 700)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])


@TOKENIZERS
@given(text=st.text())  # every Unicode text; half surrogate pairs are not among them
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@TOKENIZERS
def test_round_trip_of_real_and_awkward_text(tokenizer):
    for text in [*DOCUMENTS[:20], "a\n\n\n  b\t\r\n", "<|endoftext|>", "\x00\u200d👩‍👩‍👧", "x" * 50_000,
                 "ab c\n" * 9000]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode(tokenizer.encode("half \ud800 pair")) == "half ? pair"


@TOKENIZERS
def test_documents_are_encoded_one_by_one_with_an_end_each(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 100_000)  # several batches
    documents = ["", *DOCUMENTS, "last"]
    expected = [i for text in documents for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    ids = tokenizer.encode_documents(documents)
    assert ids.dtype == np.uint16
    assert ids.tolist() == expected
    assert len(list(tokenizer.encode_batches(documents))) > 1
    assert len(tokenizer.encode_documents([])) == 0


@TOKENIZERS
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert (loaded.kind, loaded.vocab_size, loaded.eos_id) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.vocabulary() == tokenizer.vocabulary()
    text = DOCUMENTS[0] + " <|endoftext|>"
    assert loaded.encode(text) == tokenizer.encode(text)
    foreign = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert foreign.eos_id == tokenizer.eos_id
    assert foreign.encode("def f(x):\n    return 'ü'\n") == tokenizer.encode("def f(x):\n    return 'ü'\n")


def test_byte_ids_are_bytes():
    assert (BYTE.vocab_size, BYTE.eos_id) == (257, 256)
    assert BYTE.encode("aé") == list("aé".encode())
    assert BYTE.decode([104, 105, 256, 33]) == "hi!"
    everything = bytes(range(256)).decode("latin1")
    assert BYTE._library.encode(everything).ids == list(everything.encode())  # tokenizer.json means the same


def test_bpe_vocabulary_and_compression():
    assert BPE.vocab_size == 700
    assert len(BPE.encode_documents(DOCUMENTS)) < 0.6 * len(BYTE.encode_documents(DOCUMENTS))


def test_bpe_training_is_deterministic_over_processes():
    code = ("from moedist.config.schema import DataConfig\nfrom moedist.data import Tokenizer, read_documents\n"
            "t = Tokenizer.train_bpe(read_documents(DataConfig(max_documents=60), 'train'), 700)\n"
            "print(t.vocabulary())")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             encoding="utf-8", env={**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONUTF8": "1"}).stdout
    assert printed.strip() == repr(BPE.vocabulary())
    assert Tokenizer.train_bpe(DOCUMENTS, 700).vocabulary() == BPE.vocabulary()


def test_no_warning_when_a_process_forks():
    code = ("from moedist.data import Tokenizer\nimport os\nTokenizer.byte()\n"
            "Tokenizer.train_bpe(['some text'] * 100, 300).encode_documents(['text'] * 100)\n"
            "pid = os.fork()\nos._exit(0) if pid == 0 else os.waitpid(pid, 0)")
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "parallelism" not in result.stderr


def test_errors(tmp_path):
    with pytest.raises(DataError, match="data.vocab=256 is too small.*257"):
        Tokenizer.train_bpe([], 256)
    with pytest.raises(DataError, match="is no file; choose byte, bpe"):
        Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="holds no tokenizer_settings.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer that can be read"):
        Tokenizer.from_file(str(tmp_path / "bad.json"))
    LibraryTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")).save(str(tmp_path / "endless.json"))
    with pytest.raises(DataError, match="has no end-of-text token"):
        Tokenizer.from_file(str(tmp_path / "endless.json"))
