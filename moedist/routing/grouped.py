"""Grouped: every token takes as many experts from each group, so that groups have equal loads by construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moedist.config import key
from moedist.errors import ConfigError
from moedist.routing.topk import TopKRouter


@dataclass(frozen=True)
class GroupedOptions:
    groups: int = key(2, "groups of consecutive experts, such as the devices that hold them")


class GroupedRouter(TopKRouter):
    """Mixture of Grouped Experts (MoGE; Pangu Pro MoE, Tang et al. 2025, arXiv 2505.21411): softmax over all experts, then
    the K / M best of each of M groups.

    Where a rank owns whole groups (`placement.counts`, or `placement.owners`), ranks with as many groups have equal loads
    whatever the text. The paper's weights are the scores as they are: `router.normalize=false`.
    """

    balances = False  # groups have equal loads, whatever a bias wants
    Options = GroupedOptions

    def check(self) -> None:
        group_size(self.experts, self.options.groups)
        if self.top_k % self.options.groups:
            raise ConfigError(f"router.options: groups is {self.options.groups}, but a token's {self.top_k} experts "
                              "(model.top_k) cannot be as many from each; set model.top_k to a multiple of the groups")

    def choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        groups = self.options.groups
        grouped_TGE = scores_TE.unflatten(1, (groups, -1))
        within_TGK = grouped_TGE.topk(self.top_k // groups, dim=-1).indices
        starts_G1 = torch.arange(groups, device=scores_TE.device).unsqueeze(1) * grouped_TGE.shape[2]
        # best first, as capacity wants it: the best of all groups, then all second ones
        return (within_TGK + starts_G1).transpose(1, 2).flatten(1)


def group_size(experts: int, groups: int) -> int:
    """Experts of a group.

    Raises:
        ConfigError: groups would not be equal.
    """
    if groups < 1 or experts % groups:
        raise ConfigError(f"router.options: groups is {groups}, but {experts} experts (model.experts) make no so many equal "
                          f"groups; choose one of {[n for n in range(1, experts + 1) if experts % n == 0]}")
    return experts // groups
