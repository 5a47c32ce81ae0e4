"""What every engine offers, and the step that all of them share.

Every loss is a sum over local tokens divided by the GLOBAL number of tokens, so gradients are summed, never averaged, and
uneven batches are exact. One global norm over dense and expert gradients clips both, and both are updated or neither is.
Engines differ in where the dense parameters, their gradients and optimizer state live.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Mapping

import torch

from moedist.config import TrainConfig
from moedist.engine.copies import Copies
from moedist.engine.expert_optimizer import ExpertOptimizer
from moedist.engine.forward import Reports
from moedist.engine.optimizer import moments_of
from moedist.model import Batch, BankTensors, Transformer
from moedist.world import World

FIRST_SCALE, GROWTH_STEPS = 2.0**15, 2000  # float16 loss scaling, as torch.amp.GradScaler


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping, whether the step was skipped (it is not finite), and the summed extras."""

    grad_norm: float
    skipped: bool
    sums: torch.Tensor


@dataclass(frozen=True)
class DenseGradients:
    """The part of the dense gradients that this rank updates.

    Attributes:
        tensors: reduced over all ranks; writing to them changes what the optimizer sees.
        counted: whether they belong in the global norm, where each gradient counts once.
        unit: what the sum over ranks is of them.
    """

    tensors: list[torch.Tensor]
    counted: bool
    unit: float


class Engine(ABC):
    """Holds a model in training. Experts stay with their owners, with an optimizer of their own.

    Attributes:
        dense: the dense parameters by global name.
        dense_size: how many numbers they are, wherever those live.
        updates: optimizer steps done.
    """

    def __init__(self, model: Transformer, config: TrainConfig, world: World):
        self.model, self.config, self.world = model, config, world
        self.dense = dict(model.named_parameters())
        self.dense_size = sum(p.numel() for p in self.dense.values())
        self.experts = ExpertOptimizer(model.banks, config, world.device)
        self.copies = Copies(model)
        self.scale = FIRST_SCALE if config.dtype == "float16" else 1.0
        self.good_steps, self.updates = 0, 0

    @abstractmethod
    def forward(self, batch: Batch, targets_GS: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
        """(sum of next-token losses, layer reports) of one training pass, for `backward`; CPU tensors, computed in `dtype`."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss (already divided by the global token count)."""

    @abstractmethod
    def _dense_gradients(self) -> DenseGradients:
        """Reduce the dense gradients over ranks."""

    @abstractmethod
    def _update_dense(self, lr: float) -> None:
        """Step on the gradients of `_dense_gradients`, scaled by now, and clear them."""

    @abstractmethod
    def _discard_dense(self) -> None:
        """Clear the dense gradients without a step."""

    @abstractmethod
    def _dense_tensors(self) -> dict[str, torch.Tensor]:
        """The dense part of `named_tensors`."""

    @abstractmethod
    def _dense_loaded(self) -> None:
        """The dense part of `loaded`; `updates` is set."""

    @torch.no_grad()
    def step(self, lr: float, sums: torch.Tensor) -> StepResult:
        """Sum dense gradients over ranks, clip by the global norm, update, clear gradients.

        Args:
            lr: learning rate of this step; that of experts is `expert_lr_ratio` times as large.
            sums: float64 CPU vector to be summed over ranks in the collective that the norm needs anyway.
        """
        experts = [gradient_of(p) for p in self.experts.parameters()]
        self.copies.reduce_gradients()
        dense = self._dense_gradients()
        squares = [dense.unit**2 * square_sum(dense.tensors) if dense.counted else 0.0, square_sum(experts)]
        packed = self.world.all_reduce_(torch.cat([torch.tensor(squares, dtype=torch.float64), sums]))
        square = packed[:2].sum().item()
        norm = math.sqrt(square) / self.scale if math.isfinite(square) else math.inf
        factor = 1 / self.scale
        skipped = self._adjust_scale(norm) or not math.isfinite(norm)  # one such step would spoil all weights
        if skipped:
            self._discard_dense()
        else:
            if self.config.clip and norm > self.config.clip:
                factor *= self.config.clip / norm
            _scale(experts, factor)
            _scale(dense.tensors, factor * dense.unit)
            self._update_dense(lr)
            self.experts.step(lr * self.config.expert_lr_ratio)
            self.updates += 1
            self.copies.send_weights()
        for p in self.experts.parameters():
            p.grad = None
        return StepResult(norm, skipped, packed[2:])

    def _adjust_scale(self, norm: float) -> bool:
        """Dynamic loss scaling (Micikevicius et al. 2017, arXiv 1710.03740): True where the step must be skipped."""
        if self.config.dtype != "float16":
            return False
        if not math.isfinite(norm):
            self.scale, self.good_steps = self.scale / 2, 0
            return True
        self.good_steps += 1
        if self.good_steps % GROWTH_STEPS == 0:
            self.scale *= 2
        return False

    def placed(self, moments: Mapping[int, list[BankTensors]]) -> None:
        """Experts have moved or changed: go on with the banks the model has now, and these Adam moments of each layer."""
        self.copies = Copies(self.model)
        self.experts.rebuild(moments, self.updates)
        self.copies.send_weights()

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Weights, buffers and optimizer moments by global name, detached. Every rank must call it.

        Over all ranks every name is there, in full float32 (float64 where the weights are). An expert's weights and moments
        exist on its primary alone, its index vectors, which training never sends to copies, wherever it is, and a dense
        tensor on all ranks or on one. After writing to them, `loaded` makes the training state of it.
        """
        found = self._dense_tensors()
        prefixes = ("", *(f"optimizer.{moment}." for moment in moments_of(self.config)))
        for layer, moe in self.model.moe_layers():
            found.update(moe.bank.named_indices())
            for prefix, tensors in zip(prefixes, self.experts.tensors(layer)):
                named = moe.bank.split_by_name(tensors, moe.dispatcher.layout.primary_experts)
                found.update({prefix + name: t for name, t in named.items()})
        return found

    def loaded(self, counters: dict[str, float]) -> None:
        """The newest `named_tensors` have been filled from a checkpoint: take its counters. Every rank must call it."""
        self.updates = int(counters["updates"])
        self.scale, self.good_steps = counters["scale"], int(counters["good_steps"])
        self._dense_loaded()
        self.experts.set_updates(self.updates)
        self.copies.send_weights()

    def counters(self) -> dict[str, float]:
        """Scalars that `loaded` needs to go on: updates done, loss scale."""
        return {"updates": float(self.updates), "scale": self.scale, "good_steps": self.good_steps}


def gradient_of(p: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter, zeros where this rank did not use it, while perhaps another did."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def square_sum(tensors: list[torch.Tensor]) -> float:
    """Sum of squares of all elements."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return 0.0
    norms = torch._foreach_norm(tensors)
    return torch.stack([n.double() if n.device.type != "mps" else n for n in norms]).square().sum().item()


def _scale(tensors: list[torch.Tensor], factor: float) -> None:
    if factor != 1 and tensors:
        torch._foreach_mul_(tensors, factor)
