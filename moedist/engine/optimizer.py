"""The optimizers of an engine, as the configuration describes them: the same for dense and for expert parameters."""

from __future__ import annotations

import inspect
from typing import Any, Iterable

import torch

from moedist.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Eager(torch.optim.Optimizer):
    """An optimizer without what torch wraps around its methods for torch.compile, which is not used here.

    The wrappers import torch._dynamo when an optimizer is made, and again when it steps: a second of every rank's start.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()  # one of the wrappers does this
    def step(self, closure: None = None) -> None:
        inspect.unwrap(super().step.__func__)(self)


class AdamW(_Eager, torch.optim.AdamW):
    """torch's."""


class SGD(_Eager, torch.optim.SGD):
    """torch's."""


def moments_of(config: TrainConfig) -> tuple[str, ...]:
    """Names of what the optimizer keeps for every weight, in the weight's shape."""
    return MOMENTS if config.optimizer == "adamw" else ()


def dense_groups(params: Iterable[torch.nn.Parameter], config: TrainConfig) -> list[dict]:
    """Groups of an optimizer: weight decay is for matrices only."""
    params = list(params)
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or plain SGD: `w -= lr * (gradient + weight_decay * w)`, to compare with since it keeps no state."""
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr)
    return AdamW(groups, lr=config.lr, eps=config.eps, betas=(config.beta1, config.beta2),
                 fused=device.type in ("cpu", "cuda"))


def make_state(optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor], config: TrainConfig) -> None:
    """Give AdamW its state now, so that a checkpoint can be read before the first step."""
    if config.optimizer == "adamw":
        fused = optimizer.defaults["fused"]
        for p in params:
            optimizer.state[p] = {"step": torch.zeros((), device=p.device if fused else "cpu"),
                                  **{moment: torch.zeros_like(p, requires_grad=False) for moment in MOMENTS}}


def set_updates(optimizer: torch.optim.Optimizer, updates: float) -> None:
    """Steps done so far, for Adam's bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)
