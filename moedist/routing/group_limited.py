"""GroupLimited: a token's experts come from few groups of experts, so that it travels to few nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moedist.config import key
from moedist.errors import ConfigError
from moedist.routing.grouped import group_size
from moedist.routing.loss_free import LossFreeOptions, LossFreeRouter


@dataclass(frozen=True)
class GroupLimitedOptions(LossFreeOptions):
    groups: int = key(4, "groups of consecutive experts, such as the nodes that hold them")
    top_groups: int = key(2, "groups that a token's experts may be of")


class GroupLimitedRouter(LossFreeRouter):
    """Node-limited routing of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): the `top_groups` groups with the largest sum of
    their best two scores (bias included), then the K best inside. All else is as in `LossFreeRouter`.

    DeepSeek-V3 itself has 256 experts in 8 groups, 4 of them a token, and K = 8; there the sum is of the best K / 4 scores,
    which are two.
    """

    Options = GroupLimitedOptions

    def check(self) -> None:
        super().check()
        groups, top = self.options.groups, self.options.top_groups
        size = group_size(self.experts, groups)
        if not 1 <= top <= groups or top * size < self.top_k:
            raise ConfigError(f"router.options: top_groups is {top} of {groups} groups of {size} experts, but a token goes to "
                              f"{self.top_k} (model.top_k); set top_groups between {-(-self.top_k // size)} and {groups}")

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        grouped_TGE = scores_TE.unflatten(1, (self.options.groups, -1))
        of_group_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[2]), dim=-1).values.sum(-1)
        best_TG = of_group_TG.topk(self.options.top_groups, dim=-1).indices
        open_TG = torch.zeros_like(of_group_TG, dtype=torch.bool).scatter(1, best_TG, True)
        return super().choose(grouped_TGE.masked_fill(~open_TG.unsqueeze(2), -torch.inf).flatten(1))
