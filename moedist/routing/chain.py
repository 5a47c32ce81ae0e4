"""Chain: a token goes through the experts of a layer several times, by another gate each time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.base import RouterInput, router_logits
from moedist.routing.topk import TopKRouter


@dataclass(frozen=True)
class ChainOptions:
    iterations: int = key(2, "times that a token goes through the layer, to top_k experts each time")


class ChainRouter(TopKRouter):
    """Chain-of-Experts (Wang et al. 2025, arXiv 2506.18945, section 2): x_t = x_{t-1} + sum_i g_{t,i} E_i(x_{t-1}).

    The iterations share the experts of the layer and have a gate each; the layer gives x_C, with the residual inside. The
    layer does the iterating (`MoELayer`): here are the gates. `model.top_k` is the experts of one iteration, so a token costs
    C * K rows; the paper compares at equal cost, with K over C. Shared experts see the layer's input, once.
    """

    Options = ChainOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.iterations = self.options.iterations
        self.weight = nn.Parameter(torch.empty(self.iterations, experts, width))

    def check(self) -> None:
        if self.options.iterations < 1:
            raise ConfigError(f"router.options: iterations is {self.options.iterations}; give 1 or more, such as 2")

    def most_rows_per_token(self) -> float:
        return float(self.iterations * self.top_k)

    def expected_rows_per_token(self) -> float:
        return float(self.iterations * self.top_k)

    def scores(self, inputs: RouterInput) -> torch.Tensor:
        return router_logits(inputs.x_GSD, self.weight[inputs.iteration])
