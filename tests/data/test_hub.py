"""Datasets through `datasets.load_dataset`, and what happens without a network."""

import json
import subprocess
import sys
import time

import pytest

from moedist.config.schema import DataConfig
from moedist.data.sources import read_documents, source_splits
from moedist.errors import DataError

pytest.importorskip("datasets", reason="the datasets library is not installed")

# A port that nobody listens on stands for a network without a way to the Hub, on machines that do have one.
UNREACHABLE = """
import time
import datasets
from moedist.config.schema import DataConfig
from moedist.data.sources import read_documents
from moedist.errors import DataError
for streaming in (False, True):
    start = time.perf_counter()
    try:
        list(read_documents(DataConfig(source="hub", path="owner/data", streaming=streaming), "train"))
    except DataError as error:
        print(time.perf_counter() - start, error)
"""


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    """A dataset as it lies on the Hub: a folder with one file a split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 5), ("validation", 2)):
        rows = [json.dumps({"body": f"{split} {i}"}) for i in range(count)] + [json.dumps({"body": " "})]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_reads_published_splits(dataset_folder, streaming):
    config = DataConfig(source="hub", path=str(dataset_folder), text_field="body", streaming=streaming)
    assert source_splits(config) == ("train", "valid")
    assert list(read_documents(config, "train")) == [f"train {i}" for i in range(5)]
    assert list(read_documents(config, "valid")) == ["validation 0", "validation 1"]
    short = DataConfig(source="hub", path=str(dataset_folder), text_field="body", streaming=streaming, max_documents=3)
    assert len(list(read_documents(short, "train"))) == 3
    wrong = DataConfig(source="hub", path=str(dataset_folder), streaming=streaming)
    with pytest.raises(DataError, match="no column 'text'; set data.text_field to one of: body"):
        list(read_documents(wrong, "train"))


def test_unreachable_hub_fails_at_once_and_names_the_alternatives(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = subprocess.run([sys.executable, "-c", UNREACHABLE], capture_output=True, text=True, timeout=60, check=True)
    assert len(result.stdout.splitlines()) == 2
    for line in result.stdout.splitlines():
        seconds, message = line.split(" ", 1)
        assert "data.source=embedded" in message
        assert "data.source=files data.path=FOLDER" in message
        assert float(seconds) < 8, message  # without the probe: 23 s of retries


def test_bad_name_is_told_apart_from_a_missing_network():
    start = time.perf_counter()
    with pytest.raises(DataError, match="is no dataset name"):
        list(read_documents(DataConfig(source="hub", path="a//b c"), "train"))
    assert time.perf_counter() - start < 5


def test_missing_path():
    with pytest.raises(DataError, match="needs data.path"):
        source_splits(DataConfig(source="hub"))
