"""Text, JSONL and Parquet files."""

import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedist.data.files import cut_text, files_by_split, list_files, read_files
from moedist.errors import DataError


@given(st.text(alphabet=st.sampled_from("ab \n"), max_size=300), st.integers(1, 40))
def test_cut_text_loses_nothing_and_keeps_the_bound(text, limit):
    pieces = list(cut_text(io.StringIO(text), limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cut_text_prefers_blank_lines_then_line_ends():
    text = "one\ntwo\n\nthree\nfour five six\n"
    assert list(cut_text(io.StringIO(text), 15)) == ["one\ntwo\n\n", "three\n", "four five six\n"]


def test_every_format_gives_the_same_documents(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    from pyarrow import table

    rows = [{"body": "eins\n", "id": 1}, {"body": None, "id": 2}, {"body": "zwei ünï", "id": 3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(table({key: [row[key] for row in rows] for key in rows[0]}), tmp_path / "c.parquet")
    for file in list_files(str(tmp_path)):
        assert list(read_files([file], "body")) == ["eins\n", "", "zwei ünï"], file
        with pytest.raises(DataError, match="no column 'text'; set data.text_field to one of: body, id"):
            list(read_files([file], "text"))


def test_splits_by_name_recursively(tmp_path):
    for name in ("data/train/part-0.txt", "data/train/part-1.txt", "dev.txt", "test.txt", ".hidden/x.txt", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    found = {split: [file.name for file in files] for split, files in files_by_split(str(tmp_path)).items()}
    assert found == {"train": ["part-0.txt", "part-1.txt"], "valid": ["dev.txt"], "test": ["test.txt"]}
    assert files_by_split(str(tmp_path / "dev.txt")) == {"train": [tmp_path / "dev.txt"]}


def test_folder_linked_into_itself_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(list_files(str(tmp_path))) == 1


def test_small_text_is_cut_finer_when_it_is_still_to_be_split(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("a line of a book\n" * 6000)
    assert len(list(read_files([file], "text"))) < 10
    assert len(list(read_files([file], "text", finer=True))) >= 100


def test_invalid_bytes_are_replaced(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    assert next(read_files([tmp_path / "a.txt"], "text")).endswith("caf�")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2 is not JSON"),
    ("a.jsonl", b'["x"]\n', "line 1 is no JSON object"),
    ("a.jsonl", b'{"text": 5}\n', "holds int, not text"),
    ("a.txt.gz", b"not gzip", "cannot read"),
    ("a.parquet", b"not parquet", "cannot read"),
])
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_files([tmp_path / name], "text"))
    assert "\n" not in str(error.value)


def test_missing_things_name_the_way_out(tmp_path):
    with pytest.raises(DataError, match="does not exist.*data.source=embedded"):
        list_files(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no .txt.*data.source=embedded"):
        list_files(str(tmp_path))
    (tmp_path / "valid.txt").write_text("text")
    with pytest.raises(DataError, match="named for valid but none for train"):
        files_by_split(str(tmp_path))
    (tmp_path / "notes.pdf").write_text("text")
    with pytest.raises(DataError, match="is no .txt"):
        list_files(str(tmp_path / "notes.pdf"))
