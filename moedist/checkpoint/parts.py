"""One rank's part of a checkpoint, and the index that makes parts a whole.

The format is that of torch.distributed.checkpoint, and so are planner, writer and index; only the talking between ranks is
left out: a rank writes its part by itself, in any thread, and no writer ever waits for another rank. Who writes what is agreed
before (`share`), and the parts become a checkpoint in one stroke on rank 0, once all are there.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch

from moedist.checkpoint.hashes import HASHES, TensorHash, content_hash, hashes_json, stored_hash

META, INDEX = "meta.json", ".metadata"


@dataclass(frozen=True)
class Part:
    """What a rank has written.

    Attributes:
        plan, results: of torch.distributed.checkpoint: names and shapes, and where in which file they are.
        bytes: of the tensors; seconds, hash_seconds: that writing and hashing took.
    """

    plan: Any
    results: list[Any]
    hashes: dict[str, TensorHash]
    bytes: int
    seconds: float
    hash_seconds: float


def share(holdings: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """Which names each rank writes: each once, what several hold by the one with least to write.

    Args:
        holdings: name -> bytes that each rank holds.

    >>> share([{"dense": 6, "e0": 9, "norm": 1}, {"dense": 6, "norm": 1, "e1": 2}])
    [['e0'], ['dense', 'e1', 'norm']]
    """
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(holdings):
        for name in names:
            holders.setdefault(name, []).append(rank)
    shares: list[list[str]] = [[] for _ in holdings]
    load = [0] * len(holdings)
    # what only one can write first, then the large ones
    for name in sorted(holders, key=lambda n: (len(holders[n]) > 1, -holdings[holders[n][0]][n], n)):
        rank = min(holders[name], key=lambda r: (load[r], r))
        shares[rank].append(name)
        load[rank] += holdings[rank][name]
    return [sorted(names) for names in shares]


def write_part(folder: Path, rank: int, tensors: Mapping[str, torch.Tensor]) -> Part:
    """Write and hash these tensors into a file of this rank in `folder`, and have it on disk before returning.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
    start = time.perf_counter()
    contents = {name: content_hash(tensor) for name, tensor in tensors.items()}
    hashed = time.perf_counter()
    planner, writer = DefaultSavePlanner(), FileSystemWriter(str(folder))
    planner.set_up_planner(dict(tensors), writer.storage_meta(), rank == 0)
    writer.set_up_storage_writer(rank == 0)
    # a storage writer names its files by a plan's place in the list of all ranks' plans
    plans = [SavePlan([])] * rank + [writer.prepare_local_plan(planner.create_local_plan())]
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[rank])
    results = writer.write_data(plan, planner).wait() if plan.items else []
    written = time.perf_counter()
    hashes = {}
    for result in results:
        stored, name = result.storage_data, result.index.fqn
        crc32 = stored_hash(folder / stored.relative_path, stored.offset, stored.length)
        hashes[name] = TensorHash(contents[name], crc32)
    end = time.perf_counter()
    return Part(plan, results, hashes, sum(t.numel() * t.element_size() for t in tensors.values()), end - start,
                hashed - start + end - written)


def join_parts(folder: Path, parts: Sequence[Part], meta: Mapping[str, Any]) -> None:
    """Write the index, the facts and the hashes of all ranks' parts. The folder is a checkpoint then, but for its name."""
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
    writer = FileSystemWriter(str(folder))
    writer.set_up_storage_writer(True)
    _, index = DefaultSavePlanner().create_global_plan([part.plan for part in parts])
    writer.finish(index, [part.results for part in parts])
    write_synced(folder / META, json.dumps(meta, indent=1))
    hashes = {name: h for part in parts for name, h in part.hashes.items()}
    write_synced(folder / HASHES, hashes_json(folder, (INDEX, META), hashes))
    sync_folder(folder)


def write_synced(path: Path, text: str) -> None:
    """Write a file that survives a crash of the machine."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make names made or changed in a folder survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
