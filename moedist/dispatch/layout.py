"""Where rows go and in what order they come: index arithmetic on counts, no communication.

W ranks, E experts, P placements (an expert on a rank; P = E where no expert has copies), L placements on this rank, N rows
sent, R rows received. Any owner map works: a rank may own none, all, or any ids, and an expert may have any copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Sequence

import torch

from moedist.placement import LayerPlan, split_batch


@dataclass(frozen=True)
class Layout:
    """One layer's placement as one rank sees it.

    Placements are numbered by rank, then by expert, the same on every rank. A rank sends to itself first, then to the
    others by rank, so that its own rows stay outside the collective as a contiguous head; within a rank, by expert id.

    Attributes:
        islands: of every rank, where there are several; an expert's rows then go to a copy in the same island if they can.
    """

    plan: LayerPlan
    rank: int
    world_size: int
    islands: tuple[int, ...] = ()

    def with_plan(self, plan: LayerPlan) -> "Layout":
        """The same rank's view of another placement."""
        return replace(self, plan=plan)

    @cached_property
    def experts_by_rank(self) -> list[list[int]]:
        experts: list[list[int]] = [[] for _ in range(self.world_size)]
        for e, ranks in enumerate(self.plan.owners):
            for r in ranks:
                experts[r].append(e)
        return experts

    @property
    def local_experts(self) -> list[int]:
        return self.experts_by_rank[self.rank]

    @cached_property
    def primary_experts(self) -> list[int]:
        """Local experts that this rank updates."""
        return [e for e in self.local_experts if self.plan.primaries[e] == self.rank]

    @cached_property
    def has_copies(self) -> bool:
        return any(len(ranks) > 1 for ranks in self.plan.owners)

    @cached_property
    def peers_W(self) -> list[int]:
        """This rank, then the others ascending."""
        return [self.rank] + [r for r in range(self.world_size) if r != self.rank]

    @cached_property
    def expert_P(self) -> torch.Tensor:
        """int64 [P]: the expert of each placement."""
        return torch.tensor([e for experts in self.experts_by_rank for e in experts], dtype=torch.int64)

    @cached_property
    def first_placement_W1(self) -> list[int]:
        """Placements of rank r are first[r] .. first[r + 1]."""
        first = [0]
        for experts in self.experts_by_rank:
            first.append(first[-1] + len(experts))
        return first

    @property
    def local_P(self) -> slice:
        return slice(self.first_placement_W1[self.rank], self.first_placement_W1[self.rank + 1])

    @cached_property
    def sending_P(self) -> torch.Tensor:
        """int64 [P]: placements in the order that rows are sent to them."""
        first = self.first_placement_W1
        return torch.tensor([p for r in self.peers_W for p in range(first[r], first[r + 1])], dtype=torch.int64)

    @cached_property
    def slot_of_expert_E(self) -> torch.Tensor:
        """int64 [E]: place of each expert in the order of sending (of its first placement there)."""
        order = list(dict.fromkeys(self.expert_P[self.sending_P].tolist()))
        slots = torch.empty(len(order), dtype=torch.int64)
        slots[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return slots

    def load_of_placements(self, load_WE: torch.Tensor) -> torch.Tensor:
        """int64 [W, P]: rows that every rank sends to every placement, the same on every rank."""
        load_WP = load_WE[:, self.expert_P]
        for e, ranks in enumerate(self.plan.owners):
            if len(ranks) > 1:
                columns = [self.first_placement_W1[r] + self.experts_by_rank[r].index(e) for r in ranks]
                load_WP[:, columns] = split_rows(load_WE[:, e], list(ranks), self.plan.shares[e], self.islands)
        return load_WP

    def sending_order_N(self, load_WP: torch.Tensor) -> torch.Tensor:
        """Index that cuts rows sorted by `slot_of_expert_E` into placements, in the order of sending.

        Row i of the sending buffer is row `index[i]` of the sorted rows. The identity where there are no copies.
        """
        lengths_P = load_WP[self.rank]
        by_slot = sorted(range(len(lengths_P)), key=lambda p: (int(self.slot_of_expert_E[self.expert_P[p]]), p))
        starts_P = torch.empty_like(lengths_P)
        starts_P[by_slot] = lengths_P[by_slot].cumsum(0) - lengths_P[by_slot]
        return _concatenate_ranges(starts_P[self.sending_P], lengths_P[self.sending_P])

    def send_counts(self, load_WP: torch.Tensor) -> list[int]:
        """Rows this rank sends to every rank, by rank."""
        return self.rows_of_ranks(load_WP[self.rank])

    def receive_counts(self, load_WP: torch.Tensor) -> list[int]:
        """Rows this rank receives from every rank, by rank."""
        return load_WP[:, self.local_P].sum(1).tolist()

    def expert_counts(self, load_WP: torch.Tensor) -> list[int]:
        """Rows of each local expert, from all ranks."""
        return load_WP[:, self.local_P].sum(0).tolist()

    def rows_of_ranks(self, rows_P: torch.Tensor) -> list[int]:
        """[W]: rows of the placements of every rank."""
        first = self.first_placement_W1
        return [int(rows_P[a:b].sum()) for a, b in zip(first, first[1:])]

    def arrival_to_expert_R(self, load_WP: torch.Tensor) -> torch.Tensor:
        """Index that sorts rows by expert: they arrive by peer, and by expert within a peer.

        Row i of the sorted buffer is row `index[i]` of the buffer as it arrived.
        """
        counts_PL = load_WP[self.peers_W, self.local_P]
        starts_PL = counts_PL.flatten().cumsum(0).view_as(counts_PL) - counts_PL
        return _concatenate_ranges(starts_PL.t().flatten(), counts_PL.t().flatten())


def split_rows(rows_W: torch.Tensor, owners: list[int], shares: tuple[float, ...],
               islands: Sequence[int] = ()) -> torch.Tensor:
    """[W, C]: how many of an expert's rows every rank sends to each of its C copies.

    Every copy gets its share of all rows exactly (by largest remainder). A rank with a copy keeps what it can of its own
    rows, then rows go to copies in the same island as far as those have room, and what is left goes where there is room; each
    time in rank order (the north-west corner rule of the transportation problem), so every rank works out the same split from
    the counts alone.

    Args:
        islands: of every rank; empty: all are in one.

    >>> split_rows(torch.tensor([4, 0, 2]), [0, 2], (0.5, 0.5)).tolist()
    [[3, 1], [0, 0], [0, 2]]
    >>> split_rows(torch.tensor([0, 4, 4, 0]), [0, 3], (0.5, 0.5), [0, 1, 0, 1]).tolist()
    [[0, 0], [0, 4], [4, 0], [0, 0]]
    """
    quota_C = torch.tensor(split_batch(int(rows_W.sum()), shares), dtype=torch.int64)
    kept_C = torch.minimum(rows_W[owners], quota_C)
    split_WC = torch.zeros(len(rows_W), len(owners), dtype=torch.int64)
    split_WC[owners, torch.arange(len(owners))] = kept_C
    supply_W, demand_C = rows_W - split_WC.sum(1), quota_C - kept_C
    if len(set(islands)) > 1:
        island_W = torch.tensor(islands)
        for island in sorted(set(islands)):
            here_W = island_W == island
            inside_WC = _north_west(supply_W * here_W, demand_C * here_W[owners])
            split_WC, supply_W, demand_C = split_WC + inside_WC, supply_W - inside_WC.sum(1), demand_C - inside_WC.sum(0)
    return split_WC + _north_west(supply_W, demand_C)


def _north_west(supply_W: torch.Tensor, demand_C: torch.Tensor) -> torch.Tensor:
    """[W, C]: as much of the supply as there is demand for, in order."""
    supply_end, demand_end = supply_W.cumsum(0).unsqueeze(1), demand_C.cumsum(0)
    overlap = torch.minimum(supply_end, demand_end) - torch.maximum(supply_end - supply_W.unsqueeze(1), demand_end - demand_C)
    return overlap.clamp(min=0)


def _concatenate_ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """start[0], start[0] + 1, .. (length[0] of them), start[1], ..."""
    placed = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - placed).repeat_interleave(lengths)
