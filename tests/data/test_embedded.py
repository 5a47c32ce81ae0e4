"""The corpus that every Python carries."""

import pytest

from moedist.data import embedded
from moedist.data.embedded import embedded_documents, source_files
from moedist.errors import DataError


def test_two_domains_of_a_useful_size():
    sizes = {"code": 0, "docs": 0}
    for document in embedded_documents():
        sizes[document.domain] += len(document.read())
    assert 4e6 < sizes["code"] < 12e6
    assert sizes["docs"] > 2e5


def test_names_are_unique_and_the_order_mixes_domains():
    names = [document.name for document in embedded_documents()]
    assert len(set(names)) == len(names)
    assert [document.name for document in embedded_documents()] == names
    assert {document.domain for document in embedded_documents()[:30]} == {"code", "docs"}


def test_known_documents_are_there_and_tests_are_not():
    documents = {document.name: document for document in embedded_documents()}
    assert "class ArgumentParser" in documents["code/argparse.py"].read()
    assert documents["docs/argparse.py"].read().startswith("argparse\n\nCommand-line parsing library")
    names = [name for name, _ in source_files()]
    assert names == sorted(names)
    assert not [name for name in names if "site-packages" in name or "/test/" in name or name.startswith("test/")]


def test_python_without_sources(monkeypatch):
    monkeypatch.setattr(embedded, "source_files", tuple)
    monkeypatch.setattr(embedded, "_topics", dict)
    with pytest.raises(DataError, match="finds no Python sources.*data.source=files"):
        embedded.embedded_documents()
