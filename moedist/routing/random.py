"""Random: K different experts drawn uniformly, equal weights, nothing learned."""

from __future__ import annotations

from moedist.routing.base import Assignment, Router, RouterInput, router_dtype, rows_of_tokens
from moedist.routing.noise import uniform


class RandomRouter(Router):
    """Uniform random experts as in THOR (Zuo et al. 2021, arXiv 2110.04260, section 3), each with weight 1/K.

    The draw depends on the token's place in the global batch and the seed of the step, so any number of ranks draws the
    same; in evaluation the seed is fixed.
    """

    def forward(self, inputs: RouterInput) -> Assignment:
        keys = inputs.keys_GS.flatten()
        # the K largest of E independent uniforms are a uniform draw without replacement
        experts_TK = uniform(keys, self.experts, inputs.seed).topk(self.top_k, dim=-1).indices
        weights_TK = inputs.x_GSD.new_full(experts_TK.shape, 1 / self.top_k, dtype=router_dtype(inputs.x_GSD))
        return rows_of_tokens(inputs, experts_TK, weights_TK, self.experts, self.config.capacity_factor or 0.0)
