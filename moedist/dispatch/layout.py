"""Where rows go and in what order they come: index arithmetic on counts, no communication.

W ranks, E experts, L experts owned here, N rows sent, R rows received. Any owner map works: a rank may own none, all, or
any ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from moedist.placement import LayerPlan


@dataclass(frozen=True)
class Layout:
    """One layer's placement as one rank sees it.

    A rank sends to itself first, then to the others by rank, so that its own rows stay outside the collective as a
    contiguous head; within a rank, by expert id.
    """

    plan: LayerPlan
    rank: int
    world_size: int

    @cached_property
    def peers_W(self) -> list[int]:
        """This rank, then the others ascending."""
        return [self.rank] + [r for r in range(self.world_size) if r != self.rank]

    @cached_property
    def local_experts(self) -> list[int]:
        return self.plan.experts_of_rank(self.rank)

    @cached_property
    def experts_by_peer(self) -> list[list[int]]:
        self.plan.owner_of_expert()  # refuses copies
        return [self.plan.experts_of_rank(r) for r in self.peers_W]

    @cached_property
    def slot_of_expert_E(self) -> torch.Tensor:
        """int64 [E]: place of each expert in the order of sending."""
        order = [e for experts in self.experts_by_peer for e in experts]
        slots = torch.empty(len(order), dtype=torch.int64)
        slots[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return slots

    def send_counts(self, load_WE: torch.Tensor) -> list[int]:
        """Rows this rank sends to every rank, by rank."""
        counts_E = load_WE[self.rank]
        by_peer = {r: int(counts_E[experts].sum()) for r, experts in zip(self.peers_W, self.experts_by_peer)}
        return [by_peer[r] for r in range(self.world_size)]

    def receive_counts(self, load_WE: torch.Tensor) -> list[int]:
        """Rows this rank receives from every rank, by rank."""
        return load_WE[:, self.local_experts].sum(1).tolist()

    def expert_counts(self, load_WE: torch.Tensor) -> list[int]:
        """Rows of each local expert, from all ranks."""
        return load_WE[:, self.local_experts].sum(0).tolist()

    def arrival_to_expert_R(self, load_WE: torch.Tensor) -> torch.Tensor:
        """Index that sorts rows by expert: they arrive by peer, and by expert within a peer.

        Row i of the sorted buffer is row `index[i]` of the buffer as it arrived.
        """
        counts_PL = load_WE[self.peers_W][:, self.local_experts]
        starts_PL = counts_PL.flatten().cumsum(0).view_as(counts_PL) - counts_PL
        lengths, starts = counts_PL.t().flatten(), starts_PL.t().flatten()
        sorted_starts = lengths.cumsum(0) - lengths
        return torch.arange(int(lengths.sum())) + (starts - sorted_starts).repeat_interleave(lengths)
