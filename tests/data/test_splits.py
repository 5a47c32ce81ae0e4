"""Which split a name belongs to, and what is held out where there is no validation split."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedist.data.splits import group_by_split, hold_out, split_of, unit_hash


@pytest.mark.parametrize(("name", "split"), [
    ("train.txt", "train"), ("trainset", "train"), ("wiki.train.jsonl", "train"), ("train_sft", "train"),
    ("valid.txt", "valid"), ("validation-00001.parquet", "valid"), ("dev.txt", "valid"), ("val", "valid"),
    ("test.txt", "test"), ("TEST", "test"), ("test_of_training.txt", "test"),
    ("testimony.txt", None), ("developers.txt", None), ("values.txt", None), ("pretrain.txt", None), ("book.txt", None),
])
def test_split_of(name, split):
    assert split_of(name) == split


def test_group_by_split_outermost_folder_decides():
    names = ["train/dev-notes.txt", "test/a.txt", "vocab.txt"]
    assert group_by_split(names) == {"train": ["train/dev-notes.txt"], "test": ["test/a.txt"]}


def test_unnamed_is_training_text_where_nothing_is_named_train():
    assert group_by_split(["b.txt", "a.txt", "valid.txt"]) == {"train": ["a.txt", "b.txt"], "valid": ["valid.txt"]}


@given(st.lists(st.text(max_size=3), max_size=40), st.sampled_from([0.0, 0.05, 0.5, 0.9]))
def test_hold_out_parts_the_documents(documents, fraction):
    train, valid = (list(hold_out(documents, split, fraction)) for split in ("train", "valid"))
    assert Counter(train) + Counter(valid) == Counter(documents)  # nothing lost, nothing twice
    assert not set(train) & set(valid)  # and copies of one document never on both sides
    if fraction and len(set(documents)) > 1:
        assert valid
    if not fraction:
        assert not valid


def test_hold_out_of_many_takes_about_the_fraction():
    documents = [f"document {i}" for i in range(2000)]
    valid = list(hold_out(documents, "valid", 0.05))
    assert 70 < len(valid) < 130
    assert valid == [d for d in documents if unit_hash(d) < 0.05]


def test_one_document_is_trained_on():
    assert list(hold_out(["only"], "train", 0.05)) == ["only"]
    assert not list(hold_out(["only"], "valid", 0.05))
