"""DeepSeekMoE: many small experts beside shared ones that see every token."""

from __future__ import annotations

import dataclasses

from moedist.config import RouterConfig
from moedist.routing.topk import TopKRouter


class DeepSeekMoERouter(TopKRouter):
    """Fine-grained experts and shared ones (Dai et al. 2024, arXiv 2401.06066, eq. 9-11): softmax over the routed experts, the
    K best, weights are the probabilities as they are; shared experts are added without a gate.

    Fine-grained is how the model is cut: against E experts of width F with K a token, m * E of F / m with m * K a token
    (their section 3.1), `model.shared_experts` of them beside. The balance loss is their expert-level one (eq. 12-14).
    """

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__(width, experts, top_k, dataclasses.replace(config, normalize=False), sequence)
