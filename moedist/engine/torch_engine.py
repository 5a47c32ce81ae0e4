"""The light engine: dense parameters replicated, their gradients summed over ranks; experts stay with their owners.

Every loss is a sum over local tokens divided by the GLOBAL number of tokens, so gradients are summed, never averaged, and
uneven batches are exact. One global norm over dense and expert gradients clips both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Mapping

import torch

from moedist.config import TrainConfig
from moedist.engine.copies import Copies
from moedist.engine.expert_optimizer import MOMENTS, ExpertOptimizer, adamw
from moedist.model import BankTensors, Transformer
from moedist.world import World

BUCKET_BYTES = 64 * 2**20  # gradients all-reduced at once
FIRST_SCALE, GROWTH_STEPS = 2.0**15, 2000  # float16 loss scaling, as torch.amp.GradScaler


@dataclass(frozen=True)
class StepResult:
    """Global gradient norm before clipping, whether the step was skipped (float16 overflow), and the summed extras."""

    grad_norm: float
    skipped: bool
    sums: torch.Tensor


class TorchEngine:
    """AdamW over replicated dense parameters and owned expert parameters."""

    def __init__(self, model: Transformer, config: TrainConfig, world: World):
        self.model, self.config, self.world = model, config, world
        self.dense = dict(model.named_parameters())
        matrices = [p for p in self.dense.values() if p.dim() > 1]
        others = [p for p in self.dense.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = adamw([g for g in groups if g["params"]], config, world.device)
        self.experts = ExpertOptimizer(model.banks, config, world.device)
        self.copies = Copies(model)
        self.scale = FIRST_SCALE if config.dtype == "float16" else 1.0
        self.good_steps = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss (already divided by the global token count)."""
        (loss * self.scale).backward()

    @torch.no_grad()
    def step(self, lr: float, sums: torch.Tensor) -> StepResult:
        """Sum dense gradients over ranks, clip by the global norm, update, clear gradients.

        Args:
            lr: learning rate of this step.
            sums: float64 CPU vector to be summed over ranks in the collective that the norm needs anyway.
        """
        dense = [_grad_of(p) for p in self.dense.values()]
        experts = [_grad_of(p) for p in self.experts.parameters()]
        self.copies.reduce_gradients()
        self._sum_over_ranks(dense)
        # rank 0's dense norm counts for all: devices of several kinds round differently, and every rank must clip alike
        dense_square = _square_sum(dense) if self.world.is_main else 0.0
        packed = torch.cat([torch.tensor([dense_square, _square_sum(experts)], dtype=torch.float64), sums])
        self.world.all_reduce_(packed)
        norm = math.sqrt(packed[0].item() + packed[1].item()) / self.scale if math.isfinite(packed[:2].sum()) \
            else math.inf
        skipped = self._adjust_scale_before(norm)
        if not skipped:
            self._update(lr, norm, dense + experts)
            self.copies.send_weights()
        for p in (*self.dense.values(), *self.experts.parameters()):
            p.grad = None
        return StepResult(norm, skipped, packed[2:])

    def _update(self, lr: float, norm: float, grads: list[torch.Tensor]) -> None:
        factor = 1 / self._used_scale
        if self.config.clip and norm > self.config.clip:
            factor *= self.config.clip / norm
        if factor != 1:
            torch._foreach_mul_(grads, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.experts.step(lr)

    def _adjust_scale_before(self, norm: float) -> bool:
        """Dynamic loss scaling (Micikevicius et al. 2017, arXiv 1710.03740): True where the step must be skipped."""
        self._used_scale = self.scale
        if self.config.dtype != "float16":
            return False
        if not math.isfinite(norm):
            self.scale, self.good_steps = self.scale / 2, 0
            return True
        self.good_steps += 1
        if self.good_steps % GROWTH_STEPS == 0:
            self.scale *= 2
        return False

    def _sum_over_ranks(self, grads: list[torch.Tensor]) -> None:
        if self.world.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for i, grad in enumerate(grads):
            bucket.append(grad)
            if i + 1 == len(grads) or sum(g.numel() * g.element_size() for g in bucket) >= BUCKET_BYTES:
                flat = self.world.all_reduce_(torch.cat([g.reshape(-1) for g in bucket]))
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in
                                              zip(flat.split([g.numel() for g in bucket]), bucket)])
                bucket = []

    def placed(self, moments: Mapping[int, list[BankTensors]]) -> None:
        """Experts have moved or changed: go on with the banks the model has now, and these Adam moments of each layer."""
        self.copies = Copies(self.model)
        self.experts.rebuild(moments, self.counters()["updates"])
        self.copies.send_weights()

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Weights, buffers and optimizer moments by global name, detached; writing to them writes the training state.

        Dense names are equal on every rank; an expert's weights and moments exist on its primary alone, and its index
        vectors, which training never sends to copies, wherever it is. After writing, `loaded`.
        """
        found = self.model.dense_state()
        for moment in MOMENTS:
            found.update({f"optimizer.{moment}.{name}": self.optimizer.state[p][moment] for name, p in self.dense.items()})
        prefixes = ("", *(f"optimizer.{moment}." for moment in MOMENTS))
        for layer, moe in self.model.moe_layers():
            found.update(moe.bank.named_indices())
            for prefix, tensors in zip(prefixes, self.experts.tensors(layer)):
                named = moe.bank.split_by_name(tensors, moe.dispatcher.layout.primary_experts)
                found.update({prefix + name: t for name, t in named.items()})
        return found

    def loaded(self, counters: dict[str, float]) -> None:
        """`named_tensors` have been filled from a checkpoint: take its counters, and give the weights to the copies."""
        for state in self.optimizer.state.values():
            state["step"].fill_(counters["updates"])
        self.experts.set_updates(counters["updates"])
        self.scale, self.good_steps = counters["scale"], int(counters["good_steps"])
        self.copies.send_weights()

    def counters(self) -> dict[str, float]:
        """Scalars that `loaded` needs to go on: updates done, loss scale."""
        updates = float(next(iter(self.optimizer.state.values()))["step"])
        return {"updates": updates, "scale": self.scale, "good_steps": self.good_steps}


def _grad_of(p: torch.Tensor) -> torch.Tensor:
    if p.grad is None:  # unused on this rank, perhaps not on another
        p.grad = torch.zeros_like(p)
    return p.grad


def _square_sum(tensors: list[torch.Tensor]) -> float:
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return 0.0
    norms = torch._foreach_norm(tensors)
    return torch.stack([n.double() if n.device.type != "mps" else n for n in norms]).square().sum().item()
