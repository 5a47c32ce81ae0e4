"""Full weights and optimizer moments out of what ZeRO has split over ranks, and back into it, one parameter at a time.

By DeepSpeed's documented functions of `deepspeed.utils` (https://deepspeed.readthedocs.io/en/latest/zero3.html). Every
tensor is gathered on all ranks for a moment and kept by one, in host memory, so a checkpoint costs a rank one parameter and
its share of the state, and whoever reads it needs to know nothing of ZeRO.
"""

from __future__ import annotations

from typing import Mapping

import torch

from moedist.world import World


class ZeroState:
    """The dense state of an engine of ZeRO stage 1, 2 or 3.

    Args:
        params: by global name; for stage 3 as DeepSpeed has partitioned them.
        moments: names of the optimizer's moments.
    """

    def __init__(self, params: Mapping[str, torch.nn.Parameter], moments: tuple[str, ...], stage: int, world: World):
        self._params, self._moments, self._stage, self._world = dict(params), moments, stage, world
        self._shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self._params.items()}
        self._keeper = keepers({name: shape.numel() for name, shape in self._shapes.items()}, world.size)

    @torch.no_grad()
    def read(self) -> dict[str, torch.Tensor]:
        """The tensors that this rank keeps, as CPU copies: weights, and moments as `optimizer.exp_avg.<name>`."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
        found = {}
        for name, p in self._params.items():
            for moment in (None, *self._moments):
                if moment is not None:
                    value = safe_get_full_optimizer_state(p, moment)
                else:
                    value = safe_get_full_fp32_param(p) if self._stage == 3 else p
                if self._keeper[name] == self._world.rank:
                    found[_key(name, moment)] = value.detach().to("cpu", copy=True).view(self._shapes[name])
        return found

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the tensors of `read`, with other contents."""
        for name, p in self._params.items():
            for moment in (None, *self._moments):
                if self._keeper[name] == self._world.rank:
                    value = tensors[_key(name, moment)].to(p.device, copy=True)
                else:
                    value = torch.zeros(self._shapes[name], device=p.device)
                self._set(p, self._world.all_reduce_(value), moment)  # only the keeper has other than zeros

    def _set(self, p: torch.nn.Parameter, value: torch.Tensor, moment: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param, safe_set_full_optimizer_state, safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )
        if self._stage == 3:
            part = self._part(p, value)
            if moment is not None:
                safe_set_local_optimizer_state(p, part, moment)
                return
            safe_set_local_fp32_param(p, part)
            import deepspeed
            # what the model computes with, beside the optimizer's copy
            with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
                p.copy_(value)
        elif moment is not None:
            safe_set_full_optimizer_state(p, value, moment)
        else:
            p.copy_(value)
            safe_set_full_fp32_param(p, value)

    def _part(self, p: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, the last one filled up with zeros to the size of the others."""
        size = p.ds_tensor.numel()
        part = value.new_zeros(size)
        mine = value.flatten()[size * self._world.rank:size * (self._world.rank + 1)]
        part[:len(mine)] = mine
        return part


def keepers(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> the rank that keeps it: the largest first, each to the rank that has least so far.

    >>> keepers({"a": 5, "b": 3, "c": 2, "d": 1}, 2)
    {'a': 0, 'b': 1, 'c': 1, 'd': 0}
    """
    load, found = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(ranks), key=lambda r: load[r])
        found[name], load[rank] = rank, load[rank] + sizes[name]
    return found


def _key(name: str, moment: str | None) -> str:
    return name if moment is None else f"optimizer.{moment}.{name}"
