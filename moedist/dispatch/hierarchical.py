"""Rows on their way along a route: spread to where experts are, and collected back, summed.

    spread:  own island natively, other islands through the outer transport, both at once; then, where rows go once to an
             island, its gateway sends them on natively
    collect: the same backwards; a gateway sums what its island has made of a row before that goes back

Each is the adjoint of the other, so the gradient of one is the other (`moedist.dispatch.overlap`). With each row travel the
weights of its pairs and, the first time, the placements they go to, in the same exchange.

U rows and N pairs sent, V rows and M pairs received, B rows and F rows in and out at a gateway.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Optional

import torch

from moedist.dispatch.exchange import Place
from moedist.dispatch.route import Leg, Planner, Route, Size, changes, count, inverse, read_codes, write_codes
from moedist.dispatch.segments import segment_sum
from moedist.dispatch.transport import Transport
from moedist.dispatch.wire import as_bytes, decode_rows, encode_rows, pack, packed_bytes, row_bytes, unpack
from moedist.timing import Traffic

SAMPLE = 64  # rows of an exchange that the error of rounding is measured on


@dataclass(frozen=True)
class Carrier:
    """Who carries rows, and how.

    Attributes:
        native, outer: transports over the ranks of the own island, and over all; outer is None where there is one island.
        wire_dtype: what rows are rounded to between islands, forward and backward; None: as they are.
        place: the layer, and where its traffic is written down.
    """

    native: Transport
    outer: Optional[Transport]
    wire_dtype: tuple[Optional[torch.dtype], Optional[torch.dtype]]
    place: Place


@dataclass(frozen=True)
class Parcel:
    """Rows [U, D], weights [N] of their pairs (or None), and codes [N] of where those go (or None; see `Route`)."""

    rows: torch.Tensor
    weights: Optional[torch.Tensor] = None
    codes: Optional[torch.Tensor] = None

    def cut(self, rows: slice, pairs: slice) -> "Parcel":
        return Parcel(self.rows[rows], *(None if t is None else t[pairs] for t in (self.weights, self.codes)))

    def then(self, *others: "Parcel") -> "Parcel":
        """With what others hold after it; a cat of one is no copy."""
        parcels = [p for p in (self, *others) if len(p.rows)] or [self]
        if len(parcels) == 1:
            return parcels[0]
        columns = zip(*((p.rows, p.weights, p.codes) for p in parcels))
        return Parcel(*(None if parts[0] is None else torch.cat(parts) for parts in columns))


class HierarchicalExchange:
    """One route's rows under way. At most one of spread and collect is, between its start and its finish.

    Args:
        own_apart: rows and pairs that stay on this rank are not part of it; else they take part, and come first.
    """

    def __init__(self, route: Route, planner: Planner, carrier: Carrier, own_apart: bool):
        self.route, self.carrier, self._planner = route, carrier, planner
        self.own_rows, self.own_pairs = route.own if own_apart else (0, 0)
        self._kept_rows, self._kept_pairs = route.own[0] - self.own_rows, route.own[1] - self.own_pairs
        self._fan: Optional[_Fan] = None
        self._under_way: tuple[Optional[Parcel], ...] = ()

    def spread_start(self, parcel: Parcel, backward: bool) -> None:
        """Begin to send rows of `route`, those of `own_rows` not among them."""
        near, outer = self.route.near, self.route.outer
        kept, to_near, to_outer = self._thirds(parcel, near.send)
        far = self._start("outer", outer.send, outer.receive, to_outer, backward)
        self._under_way = kept, self._start("near", near.send, near.receive, to_near, backward), far

    def spread_finish(self, backward: bool) -> Parcel:
        """What arrived."""
        (kept, near, outer), self._under_way = self._under_way, ()
        arrived = near.finish()
        taken = outer.finish() if outer else kept.cut(slice(0, 0), slice(0, 0))
        forward = self.route.forward
        if forward is not None:
            if taken.codes is not None:
                self._fan = _Fan.of(taken.codes, len(taken.rows), forward, self.route.forward_own, self._planner)
            out = self._fan.spread(taken)
            here, away = self._own_and_rest(out, self.route.forward_own)
            taken = here.then(self._start("forward", forward.send, forward.receive, away, backward).finish())
        return kept.then(arrived, taken)

    def collect_start(self, parcel: Parcel, backward: bool) -> None:
        """Begin to send back what `spread_finish` gave, or what was made of it."""
        near, outer, forward = self.route.near, self.route.outer, self.route.forward
        kept, to_near, to_outer = self._thirds(parcel, near.receive)
        arriving = self._start("near", near.receive, near.send, to_near, backward)
        if forward is not None:
            here, away = self._own_and_rest(to_outer, self.route.forward_own)
            back = self._start("forward", forward.receive, forward.send, away, backward).finish()
            to_outer = self._fan.collect(here.then(back))
        self._under_way = kept, arriving, self._start("outer", outer.receive, outer.send, to_outer, backward)

    def collect_finish(self, backward: bool) -> Parcel:
        """What came back, in the order it was spread in."""
        (kept, near, outer), self._under_way = self._under_way, ()
        return kept.then(near.finish(), *([outer.finish()] if outer else []))

    def _thirds(self, parcel: Parcel, near: Size) -> tuple[Parcel, Parcel, Parcel]:
        kept, rest = self._own_and_rest(parcel, (self._kept_rows, self._kept_pairs))
        return kept, *self._own_and_rest(rest, (near.total_rows, near.total_pairs))

    @staticmethod
    def _own_and_rest(parcel: Parcel, own: tuple[int, int]) -> tuple[Parcel, Parcel]:
        rows, pairs = own
        return parcel.cut(slice(0, rows), slice(0, pairs)), parcel.cut(slice(rows, None), slice(pairs, None))

    def _start(self, link: str, send: Size, receive: Size, parcel: Parcel, backward: bool) -> Optional["_UnderWay"]:
        """`link` is a leg of the route: near, outer or forward."""
        transport = self.carrier.outer if link == "outer" else self.carrier.native
        if transport is None:
            return None
        wire_dtype = self.carrier.wire_dtype[backward] if link == "outer" else None
        layer, meter = self.carrier.place
        traffic = meter.traffic(layer, "other" if link == "outer" else "own")
        if parcel.codes is not None:  # rows on their way to experts, the first time
            traffic.add_rows(len(parcel.rows), len(parcel.codes) if link != "forward" else 0)
        return _UnderWay(transport, send, receive, parcel, wire_dtype, traffic)


class _UnderWay:
    """One exchange of a parcel, from its start on."""

    def __init__(self, transport: Transport, send: Size, receive: Size, parcel: Parcel, wire_dtype: Optional[torch.dtype],
                 traffic: Traffic):
        rows, of_pairs = parcel.rows, [t for t in (parcel.weights, parcel.codes) if t is not None]
        self._dtype, self._wire_dtype, self._traffic = rows.dtype, wire_dtype, traffic
        self._pair_dtypes = [None if t is None else t.dtype for t in (parcel.weights, parcel.codes)]
        self._sizes = [row_bytes(rows.shape[1], rows.dtype, wire_dtype), *(t.dtype.itemsize for t in of_pairs)]
        self._lengths = [receive.rows, *(receive.pairs for _ in of_pairs)]
        encoded, lengths = encode_rows(rows, wire_dtype), [send.rows, *(send.pairs for _ in of_pairs)]
        if wire_dtype is not None:
            self._note_error(rows, encoded)
        self._start = time.perf_counter()
        self._buffer = pack([encoded, *(as_bytes(t.unsqueeze(1)) for t in of_pairs)], lengths)
        incoming = packed_bytes(self._lengths, self._sizes)
        self._out = self._buffer.new_empty(sum(incoming))
        self._pending = transport.start(self._buffer, packed_bytes(lengths, self._sizes), incoming, self._out)

    def finish(self) -> Parcel:
        before = time.perf_counter()
        self._pending.wait()
        after = time.perf_counter()
        self._traffic.add(len(self._buffer), after - self._start, after - before)
        rows, *of_pairs = unpack(self._out, self._lengths, self._sizes)
        columns = iter(of_pairs)
        return Parcel(decode_rows(rows, self._dtype, self._wire_dtype),
                      *(None if dtype is None else next(columns).view(dtype).squeeze(1) for dtype in self._pair_dtypes))

    def _note_error(self, rows: torch.Tensor, encoded: torch.Tensor) -> None:
        some = slice(None, None, max(1, len(rows) // SAMPLE))
        exact = rows[some].float()
        error = decode_rows(encoded[some].contiguous(), self._dtype, self._wire_dtype).float() - exact
        self._traffic.square = self._traffic.square + exact.square().sum()
        self._traffic.square_error = self._traffic.square_error + error.square().sum()


@dataclass(frozen=True)
class _Fan:
    """How a gateway sends on what it takes in.

    Attributes:
        row_F: the row taken in that each row sent on is; by_row_F, starts_B: rows sent on by row taken in.
        order_M, inverse_M: pairs in the order of sending on, and back; codes_M: theirs.
    """

    row_F: torch.Tensor
    by_row_F: torch.Tensor
    starts_B: torch.Tensor
    order_M: torch.Tensor
    inverse_M: torch.Tensor
    codes_M: torch.Tensor

    @classmethod
    def of(cls, codes_M: torch.Tensor, rows: int, forward: Leg, own: tuple[int, int], planner: Planner) -> "_Fan":
        row_M, placement_M, flag_M = read_codes(codes_M)
        member_M, order_M = planner.stop_W1[planner.rank_of_P[placement_M]].sort(stable=True)
        row_M = row_M.index_select(0, order_M)
        new_M = changes(member_M * (rows + 1) + row_M)
        row_F = row_M.new_empty(own[0] + forward.send.total_rows).scatter_(0, new_M.cumsum(0) - 1, row_M)
        per_row_B = count(torch.ones_like(row_F), row_F, rows)
        placement_M = placement_M.index_select(0, order_M)
        return cls(row_F, row_F.argsort(stable=True), per_row_B.cumsum(0) - per_row_B, order_M, inverse(order_M),
                   write_codes(placement_M, new_M, flag_M.index_select(0, order_M)))

    def spread(self, parcel: Parcel) -> Parcel:
        return Parcel(parcel.rows.index_select(0, self.row_F),
                      None if parcel.weights is None else parcel.weights.index_select(0, self.order_M),
                      None if parcel.codes is None else self.codes_M)

    def collect(self, parcel: Parcel) -> Parcel:
        return Parcel(segment_sum(parcel.rows, self.by_row_F, self.starts_B),
                      None if parcel.weights is None else parcel.weights.index_select(0, self.inverse_M))
