"""The light engine: dense parameters replicated, their gradients summed over ranks."""

from __future__ import annotations

import torch

from moedist.config import TrainConfig
from moedist.engine.forward import Reports, training_loss
from moedist.engine.interface import DenseGradients, Engine, gradient_of
from moedist.engine.optimizer import build_optimizer, dense_groups, make_state, moments_of, set_updates
from moedist.model import Batch, Transformer
from moedist.world import World

BUCKET_BYTES = 64 * 2**20  # gradients all-reduced at once


class TorchEngine(Engine):
    """One optimizer over replicated dense parameters, one over owned expert parameters."""

    def __init__(self, model: Transformer, config: TrainConfig, world: World):
        super().__init__(model, config, world)
        self.optimizer = build_optimizer(dense_groups(self.dense.values(), config), config, world.device)
        make_state(self.optimizer, self.dense.values(), config)

    def forward(self, batch: Batch, targets_GS: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
        return training_loss(self.model, batch, targets_GS, self.world.device, dtype)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale).backward()

    def _dense_gradients(self) -> DenseGradients:
        grads = [gradient_of(p) for p in self.dense.values()]
        self._sum_over_ranks(grads)
        # rank 0's norm counts for all: devices of several kinds round differently, and every rank must clip alike
        return DenseGradients(grads, counted=self.world.is_main, unit=1.0)

    def _sum_over_ranks(self, grads: list[torch.Tensor]) -> None:
        if self.world.size == 1:
            return
        bucket: list[torch.Tensor] = []
        for i, grad in enumerate(grads):
            bucket.append(grad)
            if i + 1 == len(grads) or sum(g.numel() * g.element_size() for g in bucket) >= BUCKET_BYTES:
                flat = self.world.sum_gradients_(torch.cat([g.reshape(-1) for g in bucket]))
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in
                                              zip(flat.split([g.numel() for g in bucket]), bucket)])
                bucket = []

    def _update_dense(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._discard_dense()

    def _discard_dense(self) -> None:
        for p in self.dense.values():
            p.grad = None

    def _dense_tensors(self) -> dict[str, torch.Tensor]:
        """Views: writing to them writes the training state. Equal on every rank."""
        found = self.model.dense_state()
        for moment in moments_of(self.config):
            found.update({f"optimizer.{moment}.{name}": self.optimizer.state[p][moment] for name, p in self.dense.items()})
        return found

    def _dense_loaded(self) -> None:
        set_updates(self.optimizer, self.updates)
