"""Islands: ranks that share a native collective library. Their process groups, and sums over all islands.

Inside an island tensors go by its own group (NCCL or RCCL, gloo on CPUs), between islands through host memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional, Sequence

import torch
import torch.distributed as dist

MOST_LANES = 8  # ranks of an island that carry sums to the others at once: a node has no more network adapters


@dataclass(frozen=True)
class Islands:
    """Islands as one rank sees them.

    Attributes:
        numbers: island of every rank.
        rank: in the world.
        own: process group of this rank's island; None where it is alone there.
        native: whether `own` is the accelerators' own library.
        lane: gloo group of the ranks that have this rank's place in their island; None where it carries no sums.
        lanes: how many ranks of an island carry sums to the others, each a part.
    """

    numbers: tuple[int, ...]
    rank: int
    own: Any
    native: bool
    lane: Any
    lanes: int

    @classmethod
    def connect(cls, numbers: Sequence[int], rank: int, backends: Sequence[Optional[str]], timeout: timedelta) -> "Islands":
        """Make the groups. Every rank must call it, with the same arguments but `rank`.

        Args:
            backends: the native library of every rank's device, None where it has none or shares the device: then gloo.
        """
        members = [[r for r, n in enumerate(numbers) if n == number] for number in sorted(set(numbers))]
        own, native = None, False
        for ranks in members:
            if len(ranks) > 1:
                common = backends[ranks[0]] if len({backends[r] for r in ranks}) == 1 else None
                group = dist.new_group(ranks, timeout=timeout, backend=common or "gloo")
                if rank in ranks:
                    own, native = group, common is not None
        lanes, lane = min(MOST_LANES, *map(len, members)) if len(members) > 1 else 0, None
        for j in range(lanes):
            group = dist.new_group([ranks[j] for ranks in members], timeout=timeout, backend="gloo")
            if any(ranks[j] == rank for ranks in members):
                lane = group
        return cls(tuple(numbers), rank, own, native, lane, lanes)

    @property
    def members(self) -> list[int]:
        """Ranks of this rank's island, ascending."""
        return [r for r, number in enumerate(self.numbers) if number == self.numbers[self.rank]]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous 1-D tensor over all ranks, in place: equal to the bit on all of them, whatever their devices.

        In the island natively; then each of its first `lanes` ranks sums a part with its like in the other islands, through
        host memory, where all ranks round alike, and tells the island.
        """
        moved = tensor if self.native or self.own is None else tensor.cpu()
        if self.own is not None:
            dist.all_reduce(moved, group=self.own)
        parts, members = moved.tensor_split(self.lanes), self.members
        if self.lane is not None:
            part = parts[members.index(self.rank)]
            host = part.cpu()
            dist.all_reduce(host, group=self.lane)
            part.copy_(host)
        if self.own is not None:
            for part, source in zip(parts, members):
                dist.broadcast(part, source, group=self.own)
        return tensor if moved is tensor else tensor.copy_(moved)
