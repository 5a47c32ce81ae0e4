"""Recurrent: a small state goes from router to router through the layers, and chooses the experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import Assignment, Router, RouterInput, router_dtype, router_logits
from moedist.routing.topk import TopKRouter


@dataclass(frozen=True)
class RecurrentOptions:
    state: int = key(64, "numbers that a token's state has")


class RecurrentRouter(TopKRouter):
    """The layerwise recurrent router, RMoE (Qiu et al. 2024, arXiv 2408.06793, section 3, eq. 4-6).

    h_i = GRU(P_i x_i, h_{i-1}), from zeros before the first layer; the experts are the K best of W_i h_i, as in `topk`. The
    projection P and the scores W are each layer's own, the GRU (Cho et al. 2014, arXiv 1406.1078; without biases) is one
    for all layers: it lives in the first layer's router, which the others are told of by `follow`. The recurrence is over
    layers, not over tokens: tokens stay independent.
    """

    Options = RecurrentOptions
    shares_weights = True

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        state = self.options.state
        self.projection = nn.Parameter(torch.empty(state, width))
        self.weight = nn.Parameter(torch.empty(experts, state))
        self.cell = nn.GRUCell(state, state, bias=False)
        self._first: tuple[RecurrentRouter, ...] = ()
        for p in (*self.cell.parameters(), self.weight):  # as recurrent cells are: small ones would hand nothing on
            p.init_std = (3 * state) ** -0.5
        self.projection.init_std = width ** -0.5

    def check(self) -> None:
        if self.options.state < 1:
            raise ConfigError(f"router.options: state is {self.options.state}; give 1 or more, such as 64")

    def follow(self, first: Router) -> None:
        """Take the GRU of the first layer's router."""
        del self.cell
        self._first = (first,)  # a tuple hides it from nn.Module: its weights are the first layer's

    def forward(self, inputs: RouterInput) -> Assignment:
        x_TP = router_logits(inputs.x_GSD, self.projection)
        before_TP = torch.zeros_like(x_TP) if inputs.carried is None else inputs.carried.to(x_TP.dtype)
        cell = (self._first[0] if self._first else self).cell
        with torch.autocast(x_TP.device.type, enabled=False):
            state_TP = cell(x_TP, before_TP)
        routed = super().forward(dataclasses.replace(inputs, carried=state_TP))
        return dataclasses.replace(routed, carried=state_TP)

    def scores(self, inputs: RouterInput) -> torch.Tensor:
        state_TP = inputs.carried
        with torch.autocast(state_TP.device.type, enabled=False):
            return state_TP @ self.weight.to(router_dtype(state_TP)).t()
