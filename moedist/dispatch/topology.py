"""Whom a rank sends rows to directly, and who takes rows in for an island.

W ranks, I islands.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch

from moedist.dispatch.transport import Transport


@dataclass(frozen=True)
class Topology:
    """Islands as one rank sees them.

    Attributes:
        islands: island of every rank, numbered from 0.
        rank: of this process.
        gateways: whether a row goes once to another island, to a rank that sends it on, instead of to each rank there.
    """

    islands: tuple[int, ...]
    rank: int
    gateways: bool

    @classmethod
    def of(cls, transport: Transport, gateways: bool) -> "Topology":
        """Of the transport's islands; one island where it knows of none."""
        labels = getattr(transport, "islands", (0,) * transport.world_size)
        known = sorted(set(labels))
        return cls(tuple(known.index(label) for label in labels), transport.rank, gateways and len(known) > 1)

    @property
    def world_size(self) -> int:
        return len(self.islands)

    @cached_property
    def members_I(self) -> list[list[int]]:
        """Ranks of every island, ascending."""
        return [[r for r, i in enumerate(self.islands) if i == island] for island in range(max(self.islands) + 1)]

    @property
    def island(self) -> int:
        return self.islands[self.rank]

    @property
    def members(self) -> list[int]:
        """Ranks of the own island, ascending."""
        return self.members_I[self.island]

    @cached_property
    def gateway_IW(self) -> list[list[int]]:
        """Who takes in the rows of every rank for every island: its ranks in turn, over all ranks outside; of those inside,
        themselves."""
        found = []
        for island, members in enumerate(self.members_I):
            turn = itertools.cycle(members)
            found.append([r if i == island else next(turn) for r, i in enumerate(self.islands)])
        return found

    @cached_property
    def near(self) -> list[int]:
        """This rank, then the others of its island ascending."""
        return [self.rank] + [r for r in self.members if r != self.rank]

    @cached_property
    def outside(self) -> list[int]:
        """Ranks of other islands, ascending."""
        return [r for r, i in enumerate(self.islands) if i != self.island]

    @cached_property
    def targets(self) -> list[int]:
        """Ranks of other islands that this rank sends rows to, ascending."""
        if not self.gateways:
            return self.outside
        return sorted(gateways[self.rank] for i, gateways in enumerate(self.gateway_IW) if i != self.island)

    @cached_property
    def sources(self) -> list[int]:
        """Ranks of other islands that this rank takes rows in from, ascending."""
        return [r for r in self.outside if not self.gateways or self.gateway_IW[self.island][r] == self.rank]

    @cached_property
    def stop_W(self) -> torch.Tensor:
        """int64 [W]: place in `near + targets` of the rank that rows for each rank are sent to."""
        place = {r: i for i, r in enumerate(self.near)}
        for i, target in enumerate(self.targets):
            served = self.members_I[self.islands[target]] if self.gateways else [target]
            place.update({r: len(self.near) + i for r in served})
        return torch.tensor([place[r] for r in range(self.world_size)], dtype=torch.int64)
