"""Which experts the next layer will want: its router, asked with what this layer's router has been given."""

from __future__ import annotations

from typing import Callable

import torch

from moedist.model import MoELayer, Transformer
from moedist.offload.cache import Cache
from moedist.offload.pieces import PieceId
from moedist.routing import Assignment


def read_ahead(model: Transformer, cache: Cache, experts: int) -> list[Callable[[], None]]:
    """Have the cache told what routers decide, and read the `experts` that the next layer seems to want most.

    Hidden states change little from a layer to the next, so the next layer's router applied to this layer's input guesses
    most of its choice (Eliseev & Mazur 2023, arXiv 2312.17238, section 3.2). Only weights are read ahead: which experts are
    restored is known too late to gain by it.

    Returns:
        Calls that end it.
    """
    layers = list(model.moe_layers())
    handles = [moe.router.register_forward_hook(_hook(layer, cache, following, experts))
               for (layer, moe), following in zip(layers, [*layers[1:], None])]
    return [handle.remove for handle in handles]


def _hook(layer: int, cache: Cache, following: tuple[int, MoELayer] | None, experts: int):
    busy = []

    @torch.no_grad()
    def hook(_, inputs: tuple, assignment: Assignment) -> None:
        if busy or not len(inputs[0].x_GSD):
            return
        cache.routed(layer, _weights(assignment))
        if following is None or not experts:
            return
        busy.append(True)
        try:
            guessed = _weights(following[1].router.forward(inputs[0]))  # forward: without the hooks of that router
        finally:
            busy.pop()
        mine = set(following[1].bank.expert_ids)
        best = sorted((e for e in guessed if e in mine), key=lambda e: (-guessed[e], e))[:experts]
        cache.read_ahead(PieceId(following[0], e, False) for e in best)

    return hook


def _weights(assignment: Assignment) -> dict[int, float]:
    ids, inverse = assignment.expert_ids_N.unique(return_inverse=True)
    sums = assignment.weights_N.new_zeros(len(ids)).index_add_(0, inverse, assignment.weights_N.detach())
    return dict(zip(ids.tolist(), sums.tolist()))
