"""Hash: the experts of a token are a fixed hash of its vocabulary id."""

from __future__ import annotations

from moedist.routing.base import Assignment, Router, RouterInput, router_dtype, rows_of_tokens
from moedist.routing.noise import uniform

HASH_SEED = 0x4A5  # fixed: the table is part of the model, not of a run


class HashRouter(Router):
    """Hash layers with a random hash (Roller et al. 2021, arXiv 2106.04426, section 3): same word, same experts.

    K > 1 takes K different experts by K hashes (their MultiHash), each with weight 1/K. Nothing is learned.
    """

    def forward(self, inputs: RouterInput) -> Assignment:
        ids = inputs.vocab_ids_GS.flatten()
        experts_TK = uniform(ids, self.experts, HASH_SEED).topk(self.top_k, dim=-1).indices
        weights_TK = inputs.x_GSD.new_full(experts_TK.shape, 1 / self.top_k, dtype=router_dtype(inputs.x_GSD))
        return rows_of_tokens(inputs, experts_TK, weights_TK, self.experts, self.config.capacity_factor or 0.0)
