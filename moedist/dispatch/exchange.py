"""The row exchange with its gradient, which is the same exchange the other way round."""

from __future__ import annotations

import time
from typing import Any, Optional, Sequence

import torch

from moedist.dispatch.transport import Transport
from moedist.timing import Meter

Place = tuple[int, Meter]  # the layer, and where its traffic is written down


class ExchangeRows(torch.autograd.Function):
    """All-to-all of rows. Rows to oneself are a plain copy outside the collective.

    Args of `apply`: rows, own rows first and then by rank; send and receive, row counts by rank, own included; transport;
    place, or None. Returns rows, own first and then by rank.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, send: Sequence[int], receive: Sequence[int],
                transport: Transport, place: Optional[Place] = None) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.transport, ctx.place = send, receive, transport, place
        return _exchange(rows_ND, send, receive, transport, place)

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple:
        return _exchange(grad_RD.contiguous(), ctx.receive, ctx.send, ctx.transport, ctx.place), None, None, None, None


def _exchange(rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], transport: Transport,
              place: Optional[Place]) -> torch.Tensor:
    own = send[transport.rank]
    assert own == receive[transport.rank], "a rank receives from itself what it sends to itself"
    out = rows.new_empty(sum(receive), rows.shape[1])
    out[:own] = rows[:own]
    away = [[0 if r == transport.rank else n for r, n in enumerate(counts)] for counts in (send, receive)]
    start = time.perf_counter()
    transport.exchange(rows[own:], *away, out=out[own:])
    if place is not None:
        layer, meter = place
        meter.traffic(layer, "own").add(rows[own:].nbytes, time.perf_counter() - start)
    return out
