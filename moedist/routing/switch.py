"""Switch: one expert a token, weighted by its probability, with a capacity."""

from __future__ import annotations

import dataclasses

from moedist.config import RouterConfig
from moedist.routing.topk import TopKRouter

DEFAULT_CAPACITY_FACTOR = 1.25


class SwitchRouter(TopKRouter):
    """Switch routing (Fedus et al. 2021, arXiv 2101.03961, section 2.1): the best expert, weight = its probability.

    Rows above the capacity are dropped: the token passes by the residual alone. The weight is never scaled to one, or
    the router would get no gradient.
    """

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        factor = DEFAULT_CAPACITY_FACTOR if config.capacity_factor is None else config.capacity_factor
        super().__init__(width, experts, 1, dataclasses.replace(config, normalize=False, capacity_factor=factor), sequence)
