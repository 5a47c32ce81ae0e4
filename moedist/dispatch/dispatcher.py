"""Dispatch and combine in six phases; no communication in the pre and post phases.

    dispatch: pre (sort rows by destination and expert) -> exchange -> post (sort arrivals by expert)
    combine:  pre (back to arrival order)               -> exchange -> post (weight, sum the rows of each token)

Collectives of a layer: one all-gather of counts, two row exchanges forward, two backward. What `combine` needs is in the
frozen `Meta` that `dispatch` returns, never on the dispatcher, so that recomputation and overlap are safe.

T tokens, D width, E experts, N rows sent, R rows received, L local experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

import torch

from moedist.dispatch.exchange import ExchangeRows, Place
from moedist.dispatch.layout import Layout
from moedist.dispatch.segments import GatherRows, PermuteRows, WeightedSum
from moedist.dispatch.transport import Transport


# (rows sorted by local expert, rows of each[, flags of the rows, where they have any]) -> results
Experts = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Loads:
    """Who computes how many rows, one for every token at every one of its experts; the same on every rank.

    Attributes:
        load_WE: int64 on the CPU, rows that each rank sent to each expert: the whole load matrix.
        rows_P: rows of every placement (CPU), see `Layout`; rows_W: rows that the experts of each rank receive.
        extra_W: what each rank added to the count exchange, [W, len(extra)].
    """

    load_WE: torch.Tensor
    rows_P: torch.Tensor
    rows_W: list[int]
    extra_W: torch.Tensor


@dataclass(frozen=True)
class Meta(Loads):
    """How rows were sent, for `combine`.

    Attributes:
        expert_counts_L: rows of each local expert.
        send, receive: rows to and from every rank, own included.
        token_N: the source of each sent row, in sending order.
        by_token_N: sent rows listed in the order of the assignment; starts_T: where each token's rows start there.
        to_expert_R, to_arrival_R: permutation of arrivals to expert order and back; None where they are in order.
    """

    expert_counts_L: list[int]
    send: list[int]
    receive: list[int]
    token_N: torch.Tensor
    by_token_N: torch.Tensor
    starts_T: torch.Tensor
    to_expert_R: Optional[torch.Tensor]
    to_arrival_R: Optional[torch.Tensor]


class Dispatcher:
    """Moves the rows of one layer. Holds the placement and the transport, no state of a step."""

    def __init__(self, layout: Layout, transport: Transport, device: torch.device = torch.device("cpu"),
                 place: Optional[Place] = None):
        self.layout, self.transport, self.place = layout, transport, place
        self.slot_of_expert_E = layout.slot_of_expert_E.to(device)

    @property
    def plain(self) -> "Dispatcher":
        """The dispatcher that sends every row by itself, for those who want to see all rows of an expert at once."""
        return self

    def for_layout(self, layout: Layout) -> "Dispatcher":
        """The same for another placement."""
        return Dispatcher(layout, self.transport, self.slot_of_expert_E.device, self.place)

    def run(self, x_TD: torch.Tensor, token_ids_N: torch.Tensor, expert_ids_N: torch.Tensor, weights_N: torch.Tensor,
            extra: torch.Tensor, experts: Experts,
            flags_N: Optional[torch.Tensor] = None) -> tuple[Callable[[], torch.Tensor], Loads]:
        """Dispatch, experts, combine.

        Args:
            flags_N: bool, travels with each row (on all ranks or on none): `experts` then gets the flags of its rows, too.

        Returns:
            (finish, loads): `finish` gives what `combine` does. A dispatcher that overlaps is waiting for rows until then.
        """
        rows, meta = self.dispatch(x_TD, token_ids_N, expert_ids_N, extra, flags_N)
        flags = []
        if flags_N is not None:
            rows, flags = rows[:, :-1].contiguous(), [rows[:, -1] > 0]
        y_TD = self.combine(experts(rows, meta.expert_counts_L, *flags), weights_N, meta)
        return lambda: y_TD, meta

    def dispatch(self, x_TD: torch.Tensor, token_ids_N: torch.Tensor, expert_ids_N: torch.Tensor,
                 extra: Optional[torch.Tensor] = None,
                 flags_N: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, Meta]:
        """Rows for the local experts, sorted by expert, and what `combine` needs.

        Args:
            x_TD: source rows.
            token_ids_N: int64, ascending: the source of each row.
            expert_ids_N: int64: the destination of each row.
            extra: int64 vector that travels with the counts, for sums over ranks that cost no collective of their own.
            flags_N: bool; rows then have one more column, 1 or 0.

        Returns:
            (rows_RD, meta); `meta.expert_counts_L` says how many rows each local expert has.
        """
        meta = self._meta(len(x_TD), token_ids_N, expert_ids_N, extra)
        rows = GatherRows.apply(x_TD, meta.token_N, meta.by_token_N, meta.starts_T)
        if flags_N is not None:
            sent = torch.empty_like(flags_N).index_copy_(0, meta.by_token_N, flags_N)
            rows = torch.cat([rows, sent.to(rows.dtype).unsqueeze(1)], dim=1)
        if self.layout.world_size > 1:
            rows = ExchangeRows.apply(rows, meta.send, meta.receive, self.transport, self.place)
            if self.place is not None:
                layer, meter = self.place
                meter.traffic(layer, "own").add_rows(len(token_ids_N) - meta.send[self.layout.rank])
            rows = PermuteRows.apply(rows, meta.to_expert_R, meta.to_arrival_R)
        return rows, meta

    def combine(self, rows_RD: torch.Tensor, weights_N: torch.Tensor, meta: Meta) -> torch.Tensor:
        """[T, D]: for every token the sum of its rows' results times `weights_N` (in the assignment's order).

        The weight is applied where the token lives, so the router's gradient is exact and local.
        """
        if self.layout.world_size > 1:
            rows_RD = PermuteRows.apply(rows_RD, meta.to_arrival_R, meta.to_expert_R)
            rows_RD = ExchangeRows.apply(rows_RD, meta.receive, meta.send, self.transport, self.place)
        return WeightedSum.apply(rows_RD, weights_N, meta.by_token_N, meta.starts_T, meta.token_N)

    @torch.no_grad()
    def _meta(self, tokens: int, token_ids_N: torch.Tensor, expert_ids_N: torch.Tensor,
              extra: Optional[torch.Tensor]) -> Meta:
        layout, device = self.layout, expert_ids_N.device
        experts = len(self.slot_of_expert_E)
        slots_N, order_N = self.slot_of_expert_E[expert_ids_N].to(torch.int32).sort(stable=True)
        per_token_T = torch.bincount(token_ids_N, minlength=tokens)
        counts_E = torch.bincount(slots_N, minlength=experts)[self.slot_of_expert_E]
        sent = counts_E if extra is None else torch.cat([counts_E, extra.to(device)])
        gathered = self.transport.all_gather_counts(sent)  # the one host sync
        load_WE, extra_W = gathered[:, :experts], gathered[:, experts:]
        load_WP = layout.load_of_placements(load_WE)
        if layout.has_copies:
            order_N = order_N.index_select(0, layout.sending_order_N(load_WP).to(device))
        by_token_N = torch.empty_like(order_N).index_copy_(0, order_N, torch.arange(len(order_N), device=device))
        to_expert = to_arrival = None
        if layout.world_size > 1:
            to_expert = layout.arrival_to_expert_R(load_WP)
            to_arrival = torch.empty_like(to_expert).index_copy_(0, to_expert, torch.arange(len(to_expert)))
            to_expert, to_arrival = to_expert.to(device), to_arrival.to(device)
        rows_P = load_WP.sum(0)
        return Meta(load_WE=load_WE, rows_P=rows_P, rows_W=layout.rows_of_ranks(rows_P), extra_W=extra_W,
                    expert_counts_L=layout.expert_counts(load_WP), send=layout.send_counts(load_WP),
                    receive=layout.receive_counts(load_WP), token_N=token_ids_N.index_select(0, order_N),
                    by_token_N=by_token_N, starts_T=per_token_T.cumsum(0) - per_token_T, to_expert_R=to_expert,
                    to_arrival_R=to_arrival)
