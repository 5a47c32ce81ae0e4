"""Spread and collect as autograd functions, each cut in two: what is computed between the halves goes on meanwhile.

Autograd goes through a graph from the newest node to the oldest. So in the backward pass `finish` comes first and starts the
exchange of gradients, then comes what was computed between the halves, and `start`, the last, waits. A *ticket*, an empty
tensor, leads from a start to its finish in the graph.
"""

from __future__ import annotations

from typing import Any

import torch

from moedist.dispatch.hierarchical import HierarchicalExchange, Parcel


class SpreadStart(torch.autograd.Function):
    """(rows_U, weights_N, exchange) -> rows and weights that stay here, if they are kept apart, and a ticket."""

    @staticmethod
    def forward(ctx: Any, rows_UD: torch.Tensor, weights_N: torch.Tensor, exchange: HierarchicalExchange) -> tuple:
        ctx.exchange = exchange
        rows, pairs = exchange.own_rows, exchange.own_pairs
        parcel = Parcel(rows_UD, weights_N, exchange.route.codes_N)
        exchange.spread_start(parcel.cut(slice(rows, None), slice(pairs, None)), backward=False)
        return rows_UD[:rows], weights_N[:pairs], rows_UD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor, _: torch.Tensor) -> tuple:
        back = Parcel(grad_rows, grad_weights).then(ctx.exchange.collect_finish(backward=True))
        return back.rows, back.weights, None


class SpreadFinish(torch.autograd.Function):
    """(ticket, exchange) -> rows_VD, weights_M, codes_M that arrived."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, exchange: HierarchicalExchange) -> tuple:
        ctx.exchange = exchange
        arrived = exchange.spread_finish(backward=False)
        ctx.mark_non_differentiable(arrived.codes)
        return arrived.rows, arrived.weights, arrived.codes

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor, _: torch.Tensor) -> tuple:
        ctx.exchange.collect_start(Parcel(grad_rows.contiguous(), grad_weights.contiguous()), backward=True)
        return grad_rows.new_empty(0), None


class CollectStart(torch.autograd.Function):
    """(rows_VD made of those that arrived, exchange) -> a ticket."""

    @staticmethod
    def forward(ctx: Any, rows_VD: torch.Tensor, exchange: HierarchicalExchange) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.collect_start(Parcel(rows_VD), backward=False)
        return rows_VD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple:
        return ctx.exchange.spread_finish(backward=True).rows, None


class CollectFinish(torch.autograd.Function):
    """(ticket, own rows that were kept apart, exchange) -> rows_UD, own first."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, own_rows: torch.Tensor, exchange: HierarchicalExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return Parcel(own_rows).then(exchange.collect_finish(backward=False)).rows

    @staticmethod
    def backward(ctx: Any, grad_UD: torch.Tensor) -> tuple:
        own, grad_UD = ctx.exchange.own_rows, grad_UD.contiguous()
        ctx.exchange.spread_start(Parcel(grad_UD[own:]), backward=True)
        return grad_UD.new_empty(0), grad_UD[:own], None
