"""Read a .wandb file back: LevelDB's log format (blocks of 32 KiB) around protobuf records, behind a header of 7 bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Iterator

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a file."""
    data, at, parts = path.read_bytes(), HEADER, b""
    while at + RECORD_HEADER <= len(data):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # no room for another in this block: zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at:at + RECORD_HEADER])
        if not kind:
            return
        parts += data[at + RECORD_HEADER:at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def name_of(item: Any) -> str:
    """Of an item of a history, configuration or summary record."""
    return item.key or ".".join(item.nested_key)


def history(path: Path) -> dict[int, dict[str, Any]]:
    """step -> values."""
    found: dict[int, dict[str, Any]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            values = {name_of(item): json.loads(item.value_json) for item in record.history.item}
            found.setdefault(values["_step"], {}).update(values)
    return found
