"""Write tensors into files of a bounded size, some by each rank, and the index that says which is where."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Mapping

import torch
from safetensors.torch import save_file

from moedist.errors import CheckpointError
from moedist.huggingface.source import INDEX
from moedist.world import World


@dataclass(frozen=True)
class Part:
    """Tensors that are made together, when their file is written and not before.

    Attributes:
        tensors: name -> (shape, dtype to write).
        make: gives them, in any dtype and on any device.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    make: Callable[[], Mapping[str, torch.Tensor]]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def numbers(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.tensors.values())


def group(parts: Iterable[Part], limit: int) -> list[list[Part]]:
    """Neighbouring parts of at most `limit` bytes together, or one that is larger."""
    found: list[list[Part]] = []
    size = 0
    for part in parts:
        if not found or size + part.bytes > limit:
            found.append([])
            size = 0
        found[-1].append(part)
        size += part.bytes
    return found


def write_shards(folder: Path, parts: Iterable[Part], limit: int, world: World) -> tuple[int, int]:
    """Write this rank's parts, and on rank 0 the index of all ranks'. Every rank must call it; a rank may have none.

    Returns:
        (files, numbers) over all ranks.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    groups = group(parts, limit)
    counts = world.gather_objects(len(groups))
    files, first = sum(counts), sum(counts[:world.rank])
    names = [f"model-{first + i + 1:05d}-of-{files:05d}.safetensors" for i in range(len(groups))]
    failure = None
    try:
        for name, members in zip(names, groups):
            _write_file(folder / name, members)
    except Exception as error:  # noqa: BLE001  told to all ranks, which would wait for this one in vain
        failure = f"could not write {folder / name}: {error}; free some space and start again"
    where = {key: name for name, members in zip(names, groups) for part in members for key in part.tensors}
    ranks = world.gather_objects((where, sum(part.bytes for members in groups for part in members), failure,
                                  sum(part.numbers for members in groups for part in members)))
    for _, _, told, _ in ranks:
        if told:
            raise CheckpointError(told)
    if world.is_main:
        index = {"metadata": {"total_size": sum(size for _, size, _, _ in ranks)},
                 "weight_map": {key: name for places, *_ in ranks for key, name in sorted(places.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files, sum(numbers for *_, numbers in ranks)


def _write_file(path: Path, parts: Iterable[Part]) -> None:
    found = {name: tensor.detach().to("cpu", part.tensors[name][1]).contiguous()
             for part in parts for name, tensor in part.make().items()}
    path.touch()
    mode = path.stat().st_mode  # as the user wants new files; the library's can be read by nobody else
    save_file(found, path, metadata={"format": "pt"})
    path.chmod(mode)
