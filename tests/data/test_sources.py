"""One way to read the documents of a split, whatever the source."""

from dataclasses import replace

import pytest

from moedist.config.schema import DataConfig
from moedist.data.embedded import embedded_documents
from moedist.data.sources import embedded_split, read_documents, source_splits
from moedist.errors import DataError

EMBEDDED = DataConfig()


def test_embedded_splits_part_the_documents():
    parts = {split: list(read_documents(EMBEDDED, split)) for split in source_splits(EMBEDDED)}
    assert list(parts) == ["train", "valid", "test"]
    assert sum(len(part) for part in parts.values()) == sum(bool(d.read().strip()) for d in embedded_documents())
    assert len(parts["train"]) > 5 * len(parts["valid"]) > 0
    assert parts["test"]


def test_code_and_documentation_of_a_module_are_in_one_split():
    # Otherwise the docstrings of validation code would have been trained on.
    modules = {d.module for d in embedded_documents() if d.domain == "code"}
    documented = {d.module for d in embedded_documents() if d.domain == "docs"}
    assert modules & documented
    assert {embedded_split(module, 0.05) for module in modules & documented} == {"train", "valid", "test"}


def test_embedded_limits():
    assert len(list(read_documents(replace(EMBEDDED, max_documents=7), "valid"))) == 7
    assert source_splits(replace(EMBEDDED, valid_fraction=0.0)) == ("train",)
    with pytest.raises(DataError, match="valid_fraction=0.6 is held out of data.source=embedded twice"):
        list(read_documents(replace(EMBEDDED, valid_fraction=0.6), "train"))


def test_one_text_file_gets_a_held_out_part(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i} of a long book\n" for i in range(20000)))
    config = DataConfig(source="files", path=str(tmp_path / "book.txt"))
    assert source_splits(config) == ("train", "valid")
    train, valid = ("".join(read_documents(config, split)) for split in ("train", "valid"))
    assert len(train) + len(valid) == (tmp_path / "book.txt").stat().st_size
    assert 0.01 < len(valid) / len(train) < 0.15
    assert not set(train.splitlines()) & set(valid.splitlines())


def test_own_splits_are_read_whole(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n")
    config = DataConfig(source="files", path=str(tmp_path))
    assert source_splits(config) == ("train", "valid", "test")
    for name in ("train", "valid", "test"):
        assert list(read_documents(config, name)) == [f"{name} text\n"]


def test_valid_is_held_out_beside_an_own_test_split(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(100)))
    (tmp_path / "test.txt").write_text("test text")
    config = DataConfig(source="files", path=str(tmp_path), max_documents=50)
    train, valid, test = (list(read_documents(config, split)) for split in ("train", "valid", "test"))
    assert sorted(train + valid) == sorted(f"document {i}" for i in range(50))
    assert valid
    assert test == ["test text"]
    without = replace(config, valid_fraction=0.0)
    assert source_splits(without) == ("train", "test")
    with pytest.raises(DataError, match="has no valid split; it has train, test"):
        read_documents(without, "valid")


def test_unknown_source():
    with pytest.raises(DataError, match="choose one of embedded, files, hub"):
        source_splits(DataConfig(source="web", path="x"))
