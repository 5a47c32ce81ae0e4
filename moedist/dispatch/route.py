"""Where the rows of one layer go when a token's row is sent once for several experts: index arithmetic, no communication.

A *pair* is a token at one of its experts. A *row* is sent once for all pairs of a token with one rank, or with one other
island, whose gateway then sends it on. Pairs of an expert with copies have a row each: which copy they go to is known only
from the counts of all ranks, too late to count shared rows in the same exchange.

T tokens, E experts, P placements, N pairs and U rows sent, W ranks, I islands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, Optional, Sequence

import torch

from moedist.dispatch.layout import Layout
from moedist.dispatch.topology import Topology


@dataclass(frozen=True)
class Size:
    """Rows and pairs, of every rank of a transport in order."""

    rows: list[int]
    pairs: list[int]

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    @property
    def total_pairs(self) -> int:
        return sum(self.pairs)


@dataclass(frozen=True)
class Leg:
    """One exchange: what goes out and what comes in, own rows left out; and the other way round in the other direction."""

    send: Size
    receive: Size


@dataclass(frozen=True)
class Route:
    """What one rank sends and receives. Rows and pairs lie in the order own, own island, other islands; see `Topology`.

    Attributes:
        own: (rows, pairs) that stay here.
        near, outer: to ranks of the own island and to others.
        forward: from this rank as a gateway to its island; `forward_own` (rows, pairs) of it stay here. None: no gateways.
        order_N, inverse_N: the assignment's pairs in the order of sending, and back.
        codes_N: of the pairs in the order of sending, see `write_codes`.
        token_U: source of each row; by_token_U, starts_T: rows token by token, and where each token's start there.
        own_counts_L, counts_L: pairs of each local expert, from this rank and from all.
    """

    own: tuple[int, int]
    near: Leg
    outer: Leg
    forward: Optional[Leg]
    forward_own: tuple[int, int]
    order_N: torch.Tensor
    inverse_N: torch.Tensor
    codes_N: torch.Tensor
    token_U: torch.Tensor
    by_token_U: torch.Tensor
    starts_T: torch.Tensor
    own_counts_L: list[int]
    counts_L: list[int]


class Planner:
    """Counts pairs and rows of one layer, and works out routes from the counts of all ranks.

    Args:
        share_rows: False: every pair has a row of its own.
    """

    def __init__(self, layout: Layout, topology: Topology, share_rows: bool, device: torch.device):
        self.layout, self.topology, self.share_rows, self.device = layout, topology, share_rows, device
        w, placements = layout.world_size, range(len(layout.expert_P))
        self.experts = layout.plan.experts
        self.rank_P = torch.tensor([r for r, held in enumerate(layout.experts_by_rank) for _ in held], dtype=torch.int64)
        copies_E = torch.bincount(layout.expert_P, minlength=self.experts)
        self.copied_P = copies_E[layout.expert_P] > 1
        placement_E = torch.empty(self.experts, dtype=torch.int64)
        placement_E[layout.expert_P] = torch.tensor(placements, dtype=torch.int64)
        self.placement_E, self.copied_E = placement_E.to(device), (copies_E > 1).to(device)
        self.by_expert_P = layout.expert_P.argsort(stable=True)
        # experts with copies count as of a rank and an island of their own, the last
        rank_E = self.rank_P[placement_E].masked_fill(copies_E > 1, w)
        stops, self.island_W = topology.stop_W, torch.tensor(topology.islands)
        self.rank_E, self.rank_of_P = rank_E.to(device), self.rank_P.to(device)
        self.stop_W1 = torch.cat([stops, stops.new_tensor([w])]).to(device)
        self.islands = len(topology.members_I)
        self.island_W1 = torch.cat([self.island_W, stops.new_tensor([self.islands])]).to(device)

    def count(self, tokens: int, token_N: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
        """int64: pairs of every expert; rows to every rank; rows to every island, if there are gateways. Experts with copies
        count among the pairs alone."""
        counts = [torch.bincount(expert_N, minlength=self.experts)]
        if self.share_rows:
            rank_N = self.rank_E[expert_N]
            order_N, new_row_N, new_rank_N = self._sorted(tokens, token_N, rank_N, None)
            rank_N = rank_N.index_select(0, order_N)
            w = self.layout.world_size
            counts.append(count(new_rank_N, rank_N, w + 1)[:w])
            if self.topology.gateways:
                counts.append(count(new_row_N, self.island_W1[rank_N], self.islands + 1)[:self.islands])
        return torch.cat(counts)

    def route(self, counted_W: torch.Tensor, load_WP: torch.Tensor, tokens: int, token_N: torch.Tensor,
              expert_N: torch.Tensor, flags_N: Optional[torch.Tensor] = None) -> Route:
        """The route of what was counted.

        Args:
            counted_W: what `count` returned on every rank, on the CPU.
            load_WP: pairs that every rank sends to every placement, see `Layout`.
            flags_N: bool of every pair, that its code carries; None: False.
        """
        layout = self.layout
        rank, local = layout.rank, layout.local_P
        sizes = self._sizes(counted_W, load_WP)
        placement_N = self._placements(load_WP, expert_N)
        alone_N = None
        if not self.share_rows:
            alone_N = torch.ones_like(expert_N, dtype=torch.bool)
        elif layout.has_copies:
            alone_N = self.copied_E[expert_N]
        order_N, new_row_N, _ = self._sorted(tokens, token_N, self.rank_of_P[placement_N], alone_N)
        row_N = new_row_N.cumsum(0) - 1
        rows = sizes["own"][0] + sizes["near"].send.total_rows + sizes["outer"].send.total_rows
        token_U = token_N.new_empty(rows).scatter_(0, row_N, token_N.index_select(0, order_N))
        per_token_T = count(torch.ones_like(token_U), token_U, tokens)
        placement_N = placement_N.index_select(0, order_N)
        flags_N = torch.zeros_like(new_row_N) if flags_N is None else flags_N.index_select(0, order_N)
        return Route(**sizes, order_N=order_N, inverse_N=inverse(order_N),
                     codes_N=write_codes(placement_N, new_row_N, flags_N), token_U=token_U,
                     by_token_U=token_U.argsort(stable=True), starts_T=per_token_T.cumsum(0) - per_token_T,
                     own_counts_L=load_WP[rank, local].tolist(), counts_L=load_WP[:, local].sum(0).tolist())

    def _sorted(self, tokens: int, token_N: torch.Tensor, rank_N: torch.Tensor,
                alone_N: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(order by stop, token and rank, where another row begins, where another row or rank does). A pair that is alone
        counts as of a token of its own, after the others."""
        pairs, ranks = len(token_N), self.layout.world_size + 1
        place_N = token_N
        if alone_N is not None:
            place_N = torch.where(alone_N, torch.arange(tokens, tokens + pairs, device=token_N.device), token_N)
        key_N, order_N = (self.stop_W1[rank_N].mul_(tokens + pairs).add_(place_N).mul_(ranks).add_(rank_N)).sort(stable=True)
        return order_N, changes(key_N.div(ranks, rounding_mode="floor")), changes(key_N)

    def _placements(self, load_WP: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
        """The placement that each pair goes to; of an expert with copies, its first pairs to the first."""
        if not self.layout.has_copies:
            return self.placement_E[expert_N]
        of_order_N = self.by_expert_P.repeat_interleave(load_WP[self.layout.rank, self.by_expert_P]).to(self.device)
        return torch.empty_like(expert_N).index_copy_(0, expert_N.argsort(stable=True), of_order_N)

    def _sizes(self, counted_W: torch.Tensor, load_WP: torch.Tensor) -> dict:
        """How many rows and pairs travel where, from what all ranks counted."""
        topology, w = self.topology, self.layout.world_size
        pairs_WW = torch.zeros(w, w, dtype=torch.int64).index_add_(1, self.rank_P, load_WP)
        rows_WW = pairs_WW
        if self.share_rows:
            alone_WW = torch.zeros_like(pairs_WW).index_add_(1, self.rank_P, load_WP * self.copied_P)
            rows_WW = counted_W[:, self.experts:self.experts + w] + alone_WW
        me, everyone = topology.rank, range(w)
        others = [r for r in topology.members if r != me]
        own = int(rows_WW[me, me]), int(pairs_WW[me, me])
        near = _leg(me, rows_WW, pairs_WW, topology.members, others, others)
        if not topology.gateways:
            return {"own": own, "near": near, "forward": None, "forward_own": (0, 0),
                    "outer": _leg(me, rows_WW, pairs_WW, everyone, topology.targets, topology.sources)}
        # what a rank sends to an island is what its gateway there takes in, and sends on to the members
        rows_WI = counted_W[:, self.experts + w:] + self._by_island(alone_WW)
        pairs_WI = self._by_island(pairs_WW)
        outer = _leg(me, rows_WI[:, self.island_W], pairs_WI[:, self.island_W], everyone, topology.targets, topology.sources)
        outside = torch.tensor(topology.outside)
        gateways = torch.tensor(topology.gateway_IW[topology.island])[outside]
        on_rows, on_pairs = (torch.zeros_like(of).index_add_(0, gateways, of[outside]) for of in (rows_WW, pairs_WW))
        return {"own": own, "near": near, "outer": outer,
                "forward": _leg(me, on_rows, on_pairs, topology.members, others, others),
                "forward_own": (int(on_rows[me, me]), int(on_pairs[me, me]))}

    def _by_island(self, of_WW: torch.Tensor) -> torch.Tensor:
        """[W, I]: summed over the ranks of every island."""
        return torch.zeros(len(of_WW), self.islands, dtype=torch.int64).index_add_(1, self.island_W, of_WW)


def _leg(me: int, rows_WW: torch.Tensor, pairs_WW: torch.Tensor, among: Sequence[int], to: Collection[int],
         source: Collection[int]) -> Leg:
    """What rank `me` sends to ranks `to`, and gets from ranks `source`, for a transport over the ranks `among`."""
    to, source = set(to), set(source)

    def size(rows: list[int], pairs: list[int], there: set[int]) -> Size:
        return Size(*([of[r] if r in there else 0 for r in among] for of in (rows, pairs)))

    return Leg(size(rows_WW[me].tolist(), pairs_WW[me].tolist(), to),
               size(rows_WW[:, me].tolist(), pairs_WW[:, me].tolist(), source))


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The inverse of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def write_codes(placement_N: torch.Tensor, new_row_N: torch.Tensor, flag_N: torch.Tensor) -> torch.Tensor:
    """int32: of every pair c = 2 placement + flag; -c - 1 where another row begins."""
    code_N = 2 * placement_N + flag_N
    return torch.where(new_row_N, -code_N - 1, code_N).to(torch.int32)


def read_codes(codes_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row, placement) of every pair, int64, and its flag, bool."""
    new_N = codes_N < 0
    code_N = torch.where(new_N, -codes_N - 1, codes_N).long()
    return new_N.cumsum(0) - 1, code_N >> 1, (code_N & 1).bool()


def changes(sorted_N: torch.Tensor) -> torch.Tensor:
    """bool: whether an entry differs from the one before; the first does."""
    changed = torch.ones_like(sorted_N, dtype=torch.bool)
    torch.ne(sorted_N[1:], sorted_N[:-1], out=changed[1:])
    return changed


def count(of_N: torch.Tensor, bin_N: torch.Tensor, bins: int) -> torch.Tensor:
    """int64 [bins]: sums of `of_N`; as `bincount`, but without asking a GPU how many bins there are."""
    return torch.zeros(bins, dtype=torch.int64, device=bin_N.device).scatter_add_(0, bin_N, of_N.long())
