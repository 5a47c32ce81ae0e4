"""Progressive: tokens start with many experts and end with K, so that all experts learn before routes are sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moedist.config import RouterConfig, key
from moedist.errors import ConfigError
from moedist.routing.topk import TopKRouter


@dataclass(frozen=True)
class ProgressiveOptions:
    start: int = key(0, "experts of a token at the first step (0: all)")
    steps: int = key(1000, "steps in which they fall evenly to model.top_k")


class ProgressiveRouter(TopKRouter):
    """Progressive sparsification as in Sigma-MoE-Tiny (Hu et al. 2025, arXiv 2512.16248): more experts a token early in
    training, K later, since a balance loss fails in very sparse layers that start so. They saw that in lower layers; here
    every layer with experts does it, and the number falls evenly over `steps`.

    Steps done are state of the model, saved with it: an evaluation routes as training does at that step.
    """

    Options = ProgressiveOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, config, sequence)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def check(self) -> None:
        o = self.options
        if o.start and not self.top_k <= o.start <= self.experts or o.steps < 1:
            raise ConfigError(f"router.options: start is {o.start} and steps {o.steps}; start with {self.top_k} (model.top_k) "
                              f"to {self.experts} (model.experts) experts, or 0 for all, in 1 step or more")

    def most_rows_per_token(self) -> float:
        return float(self.options.start or self.experts)

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        now = experts_at(int(self.steps), self.options.start or self.experts, self.top_k, self.options.steps)
        return scores_TE.topk(now, dim=-1).indices

    @torch.no_grad()
    def after_step(self, demand_E: torch.Tensor) -> None:
        """Count a step, beside what `TopKRouter` does."""
        super().after_step(demand_E)
        self.steps += 1


def experts_at(done: int, start: int, end: int, steps: int) -> int:
    """Experts of a token after so many steps: from `start` evenly down to `end`.

    >>> [experts_at(done, 8, 2, 3) for done in range(5)]
    [8, 6, 4, 2, 2]
    """
    return end + math.ceil((start - end) * max(0, steps - done) / steps)
