"""Documents from local text, JSONL and Parquet files."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from moedist.data.splits import group_by_split
from moedist.errors import DataError

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

MAX_DOCUMENT_CHARS = 32_768
MIN_DOCUMENT_CHARS = 512
MIN_PIECES = 100  # a small text is cut finer, so that holding out 5 % of the pieces has pieces to choose from


def list_files(path: str) -> list[Path]:
    """Every readable file under a folder (recursively, hidden ones apart), or the one file itself, sorted.

    Raises:
        DataError: the path does not exist, or holds nothing that can be read.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data.path={path} does not exist (looked in {Path.cwd()}); give a file or folder of "
                        f"{', '.join(SUFFIXES)}, or use data.source=embedded")
    if root.is_file():
        if not root.name.lower().endswith(SUFFIXES):
            raise DataError(f"data.path={path} is no {', '.join(SUFFIXES)} file; rename or convert it, "
                            "or use data.source=embedded")
        return [root]
    found: list[Path] = []
    seen: set[str] = set()  # clusters link data sets into place: follow links, but not in a circle
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names
                  if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if not found:
        raise DataError(f"data.path={path} holds no {', '.join(SUFFIXES)} file; give another folder, "
                        "or use data.source=embedded")
    return sorted(found)


def files_by_split(path: str) -> dict[str, list[Path]]:
    """The files of each split, found by file and folder names; a single file is training text whatever its name.

    Raises:
        DataError: as `list_files`, or there is no training file beside the validation or test files.
    """
    files = list_files(path)
    root = Path(path).expanduser()
    if root.is_file():
        return {"train": files}
    groups = group_by_split(file.relative_to(root).as_posix() for file in files)
    if "train" not in groups:
        raise DataError(f"data.path={path} has files named for {' and '.join(groups)} but none for train; "
                        "rename one to train*, or give data.path=FILE")
    return {split: [root / name for name in names] for split, names in groups.items()}


def read_files(files: list[Path], text_field: str, finer: bool = False) -> Iterator[str]:
    """The documents of some files, in order.

    Args:
        files: text (cut into documents of at most 32,768 characters), JSONL or Parquet (one document a row).
        text_field: the column that holds the text of JSONL and Parquet rows; empty rows are left out.
        finer: cut a small text into about 100 documents or more, for a corpus that is still to be split.

    Raises:
        DataError: an unreadable file, a broken JSON line, a missing column.
    """
    limit = MAX_DOCUMENT_CHARS
    if finer:
        total = sum(file.stat().st_size for file in files)
        limit = max(MIN_DOCUMENT_CHARS, min(limit, total // MIN_PIECES))
    for file in files:
        name = file.name.lower()
        try:
            if name.endswith(PARQUET_SUFFIXES):
                yield from _read_parquet(file, text_field)
                continue
            # errors="replace": one bad byte in a big crawl must not end the run
            opener = gzip.open if name.endswith(".gz") else open
            with opener(file, "rt", encoding="utf-8", errors="replace") as stream:
                if name.endswith(TEXT_SUFFIXES):
                    yield from cut_text(stream, limit)
                else:
                    yield from _read_jsonl(stream, file, text_field)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {file}: {error}; mend or remove it") from error


def cut_text(stream: TextIO, limit: int) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters that join to the text again.

    A piece ends at the first blank line once it is half full, else at a line end, and inside a line only where one
    line is longer than the limit.
    """
    lines: list[str] = []
    size = 0
    for line in iter(lambda: stream.readline(limit), ""):
        if size + len(line) > limit:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
        if size * 2 >= limit and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def text_of(row: dict, text_field: str, where: str) -> str:
    """The text of one row, "" for null.

    Raises:
        DataError: the column is missing (the message names those that exist) or holds something else than text.
    """
    if text_field not in row:
        raise DataError(missing_column(text_field, row, where))
    value = row[text_field]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: data.text_field={text_field} holds {type(value).__name__}, not text; "
                        f"columns: {', '.join(row)}")
    return value or ""


def missing_column(text_field: str, columns: Iterable[str], where: str) -> str:
    """The message for a text column that is not there."""
    return f"{where} has no column {text_field!r}; set data.text_field to one of: {', '.join(columns) or '(none)'}"


def _read_jsonl(stream: TextIO, file: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number} is not JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number} is no JSON object; write one {{\"{text_field}\": ...}} a line")
        yield text_of(row, text_field, f"{file}, line {number}")


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet  # lazily: only Parquet needs it
    except ImportError as error:
        raise DataError(f"reading {file} needs pyarrow; pip install pyarrow, or convert it to JSONL") from error
    try:
        table = parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise DataError(missing_column(text_field, table.schema_arrow.names, str(file)))
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for row in batch.to_pylist():
                yield text_of(row, text_field, str(file))
    except ArrowException as error:
        raise DataError(f"cannot read {file}: {' '.join(str(error).split())}; mend or remove it") from error
