"""What a trained model's routing is like on held-out text, seen from hooks while it is evaluated: loads, and who goes where.

T tokens, E experts, K top-k. Only hooks: the model computes what it computes in any evaluation.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import torch

from moedist.model import LayerReport, Transformer
from moedist.monitor import chosen_pairs, shared_pairs
from moedist.routing import Assignment, Router, RouterInput, mix_seeds

Pairs = dict[tuple[int, int], torch.Tensor]  # (layer, how-manieth call of its router in the pass) -> (token, expert) pairs


class RoutingWatch:
    """Sums loads over all forward passes of a model, and keeps the routing of the first; a context manager.

    Args:
        noise: None, or route the tokens of the first pass once more with Gaussian noise of this relative size on the
            router's input, see `with_noise`.

    Attributes:
        loads: layer -> rows of every expert, [E]. dropped, wanted: rows that capacity dropped, and all; of all layers.
        pairs, noisy: routing of the first pass, and the same with noise.
    """

    def __init__(self, model: Transformer, noise: float | None = None):
        self.model, self.noise = model, noise
        self.loads: dict[int, torch.Tensor] = {}
        self.dropped = self.wanted = 0.0
        self.pairs: Pairs = {}
        self.noisy: Pairs = {}
        self._calls: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._first: list[Any] = []

    def __enter__(self) -> "RoutingWatch":
        for layer, owner, moe in self.model.routed_layers():
            self._hooks.append(moe.register_forward_hook(
                lambda _, __, result, owner=owner: self._count(owner, result[1])))
            self._first.append(moe.router.register_forward_hook(
                lambda router, inputs, routed, layer=layer: self._note(layer, router, inputs[0], routed)))
        self._first.append(self.model.register_forward_hook(lambda *_: self._end_first_pass()))
        return self

    def __exit__(self, *_: object) -> None:
        self._end_first_pass()
        for hook in self._hooks:
            hook.remove()

    def _end_first_pass(self) -> None:
        while self._first:
            self._first.pop().remove()

    def _count(self, layer: int, report: LayerReport) -> None:
        self.loads[layer] = self.loads.get(layer, 0) + report.load_WE.sum(0).double()
        dropped = float(report.stats.get("dropped_rows", 0.0))
        self.dropped += dropped
        self.wanted += dropped + float(report.load_WE.sum())

    def _note(self, layer: int, router: Router, inputs: RouterInput, routed: Assignment) -> None:
        call = self._calls[layer] = self._calls.get(layer, -1) + 1
        self.pairs[layer, call] = chosen_pairs(routed, router.experts, router.top_k)
        if self.noise is not None:
            moved = dataclasses.replace(inputs, x_GSD=with_noise(inputs.x_GSD, self.noise, mix_seeds(layer, call)))
            self.noisy[layer, call] = chosen_pairs(router.forward(moved), router.experts, router.top_k)


def with_noise(x_GSD: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """x plus Gaussian noise whose norm is, in expectation, `size` times that of each token's x."""
    noise = torch.randn(x_GSD.shape, generator=torch.Generator().manual_seed(seed)).to(x_GSD)
    scale_GS1 = x_GSD.norm(dim=-1, keepdim=True) * (size / x_GSD.shape[-1] ** 0.5)
    return x_GSD + noise * scale_GS1


def agreement(before: Pairs, after: Pairs) -> float:
    """Mean over layers of 2 |A and B| / (|A| + |B|), A and B the (token, expert) pairs of two routings of the same tokens.

    Where every token has K experts in both, this is the part of its K that a token keeps, mean over tokens; the coefficient
    of Dice (1945, doi 10.2307/1932409) counts tokens with more or fewer experts fairly both ways. 1 where neither routes
    anything.
    """
    found = [2 * shared_pairs(a, after[key]) / total if (total := len(a) + len(after[key])) else 1.0
             for key, a in before.items()]
    return sum(found) / len(found)


def mean_over_layers(measure: Any, loads: Mapping[int, torch.Tensor]) -> float:
    """Of a measure of one layer's loads [E]."""
    return sum(measure(load_E) for load_E in loads.values()) / len(loads)
