"""A dispatcher that sends a token's row once to a rank or an island, and computes its own rows while others travel.

    spread:  a row for every token and rank (or island), with the gate weights and placements of its pairs
    experts: at the receiving rank a row for every pair, sorted by expert; their weighted sum for every row that came
    collect: that sum back, one row for every row that was sent; the token's sum over them

Collectives of a layer: one all-gather of counts, two row exchanges forward, two backward; with gateways each of these is one
native, one outer and one more native exchange. Tokens cut into n pieces make n times as many, less the counts.

T tokens, N pairs and U rows sent, V rows and M pairs received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch

from moedist.dispatch.dispatcher import Dispatcher, Experts, Loads
from moedist.dispatch.exchange import Place
from moedist.dispatch.hierarchical import Carrier, HierarchicalExchange
from moedist.dispatch.layout import Layout
from moedist.dispatch.overlap import CollectFinish, CollectStart, SpreadFinish, SpreadStart
from moedist.dispatch.route import Planner, Route, count, inverse, read_codes
from moedist.dispatch.segments import GatherRows, PermuteRows, SumRows, WeightedSum
from moedist.dispatch.topology import Topology
from moedist.dispatch.transport import Transport
from moedist.timing import Meter


@dataclass(frozen=True)
class Sharing:
    """How rows travel: `DispatchConfig` with its choices made.

    Attributes:
        dedup: none, rank or island.
        wire_dtype: of rows between islands, forward and backward; None: as they are.
        overlap: compute own rows while others travel.
        pieces: that the tokens are cut into.
    """

    dedup: str = "none"
    wire_dtype: tuple[torch.dtype | None, torch.dtype | None] = (None, None)
    overlap: bool = False
    pieces: int = 1


@dataclass(frozen=True)
class _Piece:
    """Some of the tokens, with their pairs."""

    x_TD: torch.Tensor
    token_N: torch.Tensor
    expert_N: torch.Tensor
    weights_N: torch.Tensor
    flags_N: torch.Tensor | None


class DedupDispatcher:
    """Moves the rows of one layer, sharing them. Holds the placement and the transport, no state of a step."""

    def __init__(self, layout: Layout, transport: Transport, device: torch.device, sharing: Sharing,
                 place: Place | None = None):
        self.layout, self.transport, self.sharing = layout, transport, sharing
        self.device, self.place = device, place or (0, Meter())
        topology = Topology.of(transport, gateways=sharing.dedup == "island")
        self._planner = Planner(layout, topology, sharing.dedup != "none", device)

    @property
    def plain(self) -> Dispatcher:
        """The dispatcher that sends every row by itself, for those who want to see all rows of an expert at once."""
        return Dispatcher(self.layout, self.transport, self.device)

    def for_layout(self, layout: Layout) -> "DedupDispatcher":
        """The same for another placement."""
        return DedupDispatcher(layout, self.transport, self.device, self.sharing, self.place)

    def run(self, x_TD: torch.Tensor, token_ids_N: torch.Tensor, expert_ids_N: torch.Tensor, weights_N: torch.Tensor,
            extra: torch.Tensor, experts: Experts,
            flags_N: torch.Tensor | None = None) -> tuple[Callable[[], torch.Tensor], Loads]:
        """Send rows to their experts and begin to bring the results back.

        Args:
            x_TD: source rows.
            token_ids_N: int64, ascending: the source of each pair; expert_ids_N: int64, its expert; weights_N: its weight.
            extra: int64 vector that travels with the counts.
            experts: called with rows sorted by local expert and how many each has, up to twice a piece.
            flags_N: see `Dispatcher.run`; here they travel in the codes of pairs.

        Returns:
            (finish, loads): `finish` waits for the results and gives [T, D], for every token the weighted sum over its
            experts; what is computed before it is called goes on meanwhile.
        """
        pieces = self._pieces(x_TD, token_ids_N, expert_ids_N, weights_N, flags_N)
        with torch.no_grad():
            routes, loads = self._routes(pieces, extra)
        started, back = [self._start(pieces[0], routes[0])], []
        for i, (piece, route) in enumerate(zip(pieces, routes)):
            if i + 1 < len(pieces):
                started.append(self._start(pieces[i + 1], routes[i + 1]))
            back.append(self._compute(*started[i], experts, flags_N is not None))
            started[i] = ()

        def finish() -> torch.Tensor:
            parts = []
            for route, (ticket, own_UD, exchange) in zip(routes, back):
                rows_UD = CollectFinish.apply(ticket, own_UD, exchange)
                parts.append(SumRows.apply(rows_UD, route.token_U, route.by_token_U, route.starts_T))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return finish, loads

    def _pieces(self, x_TD: torch.Tensor, token_N: torch.Tensor, expert_N: torch.Tensor,
                weights_N: torch.Tensor, flags_N: torch.Tensor | None) -> list[_Piece]:
        n, tokens = self.sharing.pieces, len(x_TD)
        if n == 1:
            return [_Piece(x_TD, token_N, expert_N, weights_N, flags_N)]
        cuts = [tokens * i // n for i in range(n + 1)]
        ends = torch.searchsorted(token_N, torch.tensor(cuts, device=token_N.device)).tolist()  # on a GPU one more host sync
        parts = (tensor.split([b - a for a, b in zip(of, of[1:])])
                 for tensor, of in ((x_TD, cuts), (token_N, ends), (expert_N, ends), (weights_N, ends)))
        flags = n * [None] if flags_N is None else flags_N.split([b - a for a, b in zip(ends, ends[1:])])
        return [_Piece(x, t - first, e, w, f) for x, t, e, w, first, f in zip(*parts, cuts, flags)]

    def _routes(self, pieces: list[_Piece], extra: torch.Tensor) -> tuple[list[Route], Loads]:
        """One exchange of counts for all pieces."""
        planner, layout = self._planner, self.layout
        counts = [planner.count(len(p.x_TD), p.token_N, p.expert_N) for p in pieces]
        gathered = self.transport.all_gather_counts(torch.cat([*counts, extra.to(counts[0].device)]))  # the one host sync
        *counted, extra_W = gathered.split([*map(len, counts), len(extra)], dim=1)
        loads_WE = [of_piece[:, :planner.experts] for of_piece in counted]
        loads_WP = [layout.load_of_placements(load_WE) for load_WE in loads_WE]
        routes = [planner.route(of_piece, load_WP, len(p.x_TD), p.token_N, p.expert_N, p.flags_N)
                  for p, of_piece, load_WP in zip(pieces, counted, loads_WP)]
        rows_P = sum(loads_WP).sum(0)
        return routes, Loads(load_WE=sum(loads_WE), rows_P=rows_P, rows_W=layout.rows_of_ranks(rows_P), extra_W=extra_W)

    def _start(self, piece: _Piece, route: Route) -> tuple:
        outer = getattr(self.transport, "outer", None)
        native = self.transport if outer is None else self.transport.native
        carrier = Carrier(native, outer, self.sharing.wire_dtype, self.place)
        exchange = HierarchicalExchange(route, self._planner, carrier, self.sharing.overlap)
        rows_UD = GatherRows.apply(piece.x_TD, route.token_U, route.by_token_U, route.starts_T)
        weights_N = PermuteRows.apply(piece.weights_N, route.order_N, route.inverse_N)
        return *SpreadStart.apply(rows_UD, weights_N, exchange), exchange

    def _compute(self, own_UD: torch.Tensor, own_weights_N: torch.Tensor, ticket: torch.Tensor,
                 exchange: HierarchicalExchange, experts: Experts,
                 flagged: bool) -> tuple[torch.Tensor, torch.Tensor, HierarchicalExchange]:
        """Own rows, then those that arrived, through their experts; the latter begin to travel back."""
        route, counts = exchange.route, exchange.route.counts_L
        if self.sharing.overlap:
            own_codes = route.codes_N[:exchange.own_pairs]
            own_UD = self._through(own_UD, own_weights_N, own_codes, route.own_counts_L, experts, flagged)
            counts = [n - own for n, own in zip(counts, route.own_counts_L)]
        rows_VD, weights_M, codes_M = SpreadFinish.apply(ticket, exchange)
        sums_VD = self._through(rows_VD, weights_M, codes_M, counts, experts, flagged)
        return CollectStart.apply(sums_VD, exchange), own_UD, exchange

    def _through(self, rows_VD: torch.Tensor, weights_M: torch.Tensor, codes_M: torch.Tensor, counts: list[int],
                 experts: Experts, flagged: bool) -> torch.Tensor:
        """[V, D]: for every row the weighted sum over its experts here."""
        with torch.no_grad():
            row_M, placement_M, flag_M = read_codes(codes_M)
            order_M = placement_M.argsort(stable=True)
            place_M, per_row_V = inverse(order_M), count(torch.ones_like(row_M), row_M, len(rows_VD))
            starts_V, row_M = per_row_V.cumsum(0) - per_row_V, row_M.index_select(0, order_M)
            flags = [flag_M.index_select(0, order_M)] if flagged else []
        rows_MD = GatherRows.apply(rows_VD, row_M, place_M, starts_V)
        return WeightedSum.apply(experts(rows_MD, counts, *flags), weights_M, place_M, starts_V, row_M)
