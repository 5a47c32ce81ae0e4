"""Dense parameters by DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), beside experts that stay with their owners.

DeepSpeed sees the dense parameters alone: experts are outside the module tree. It keeps float32 weights, like the torch
engine, and low precision comes from autocast: then both engines compute the same, routers see unrounded weights, gradients
are summed in float32, and a checkpoint of one goes on in the other without rounding. ZeRO's own half-precision mode would
hold half as many bytes of weights and gradients, which stages 2 and 3 make small by splitting them.

Clipping, loss scaling and accumulation are those of `Engine.step`: DeepSpeed averages gradients over ranks, so what it has
averaged is scaled to a sum together with clipping, between its reduction and its optimizer step.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from moedist.config import EngineConfig, TrainConfig
from moedist.engine.deepspeed_config import deepspeed_json, zero_stage
from moedist.engine.deepspeed_start import start_deepspeed
from moedist.engine.forward import Reports, drawn, hidden_states, losses_of_draws, with_consistency
from moedist.engine.interface import DenseGradients, Engine
from moedist.engine.optimizer import build_optimizer, dense_groups, make_state, moments_of, set_updates
from moedist.engine.zero_state import ZeroState
from moedist.model import Batch, Transformer
from moedist.world import World


class DeepSpeedEngine(Engine):
    """ZeRO stage 0 to 3 for the dense parameters.

    At stage 3 the model's dense parameters are empty between their uses; `named_tensors` has them in full.
    """

    def __init__(self, model: Transformer, config: TrainConfig, world: World, settings: EngineConfig):
        super().__init__(model, config, world)
        self.stage, self.offload = zero_stage(settings), settings.offload != "none"
        self._optimizer = build_optimizer(dense_groups(self.dense.values(), config), config, world.device)
        root = _WithLoss(model)
        self._deepspeed = start_deepspeed(root, self._optimizer, deepspeed_json(settings), world)
        self._zero = self._deepspeed.optimizer  # at stage 0 the optimizer itself
        # stages 0 and 1 reduce in `step`, once; 2 and 3 split gradients as they come, in every backward pass
        self._deepspeed.enable_backward_allreduce = self.stage >= 2
        if self.stage == 3:
            _gather_for_gradients(root)
        make_state(self._optimizer, self._updated(), config)
        if self.stage in (1, 2) and moments_of(config):
            self._zero._lazy_init_hp_params_optimizer_state()  # or moments can be read only after the first step
        self._state = ZeroState(self.dense, moments_of(config), self.stage, world) if self.stage else None
        self._given: dict[str, torch.Tensor] = {}  # what `named_tensors` gave, for `loaded`
        self._passes = 0

    def forward(self, batch: Batch, targets_GS: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
        self._passes += 1
        self._deepspeed.set_gradient_accumulation_boundary(self._passes == self.config.accumulate)
        device = self.world.device
        return self._deepspeed(batch.to(device), targets_GS.to(device), dtype)

    def backward(self, loss: torch.Tensor) -> None:
        self._deepspeed.backward(loss * self.scale)

    def _updated(self) -> list[torch.Tensor]:
        """What the optimizer updates: the parameters, or with ZeRO this rank's flat parts of them."""
        if self.stage == 0:
            return list(self.dense.values())
        return list(self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups)

    def _dense_gradients(self) -> DenseGradients:
        if self._passes != self.config.accumulate:
            raise ValueError(f"{self._passes} forward passes before a step, but train.accumulate is {self.config.accumulate}")
        self._passes = 0
        if self.stage < 2:
            self._deepspeed.allreduce_gradients()
        return DenseGradients(self._reduced(), counted=self.stage > 0 or self.world.is_main, unit=self.world.size)

    def _reduced(self) -> list[torch.Tensor]:
        """Averages over ranks: of this rank's part with ZeRO, else of all."""
        if self.stage == 0 or self.offload:
            return [p.grad for p in self._updated()]
        return [part for of_group in self._zero.averaged_gradients.values() for part in of_group]

    def _update_dense(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        self._given = {}

    def _discard_dense(self) -> None:
        if self.stage == 0:
            self._deepspeed.zero_grad()
            return
        # ZeRO clears its gradients in a step alone: it makes one in which the optimizer does nothing
        for part in self._reduced():
            part.zero_()
        self._optimizer.step = lambda: None
        try:
            self._deepspeed.step()
        finally:
            del self._optimizer.step  # the method shows again

    def _dense_tensors(self) -> dict[str, torch.Tensor]:
        """At stage 0 views, equal on every rank. Else copies in host memory, kept until the next step: of buffers on every
        rank, of a parameter and its moments on one."""
        if self._state is None:
            found = self.model.dense_state()
            for moment in moments_of(self.config):
                found.update({f"optimizer.{moment}.{name}": self._optimizer.state[p][moment]
                              for name, p in self.dense.items()})
            return found
        self._given = self._state.read()
        return {name: t for name, t in self.model.dense_state().items() if name not in self.dense} | self._given

    def _dense_loaded(self) -> None:
        if self._state is not None:
            self._state.write(self._given)
            self._given = {}
        set_updates(self._optimizer, self.updates)


def _gather_for_gradients(root: "_WithLoss") -> None:
    """Have ZeRO-3 gather every parameter when its gradient is stored, which torch does in the parameter's own shape.

    By itself it gathers a module's parameters when a gradient reaches the tensors that the module gave. That misses the head,
    which uses the weight of another module and is told so here; routers, which give a dataclass; and a block that is computed
    again in the backward pass, whose parameters are let go after that.
    """
    import deepspeed
    deepspeed.zero.register_external_parameter(root.loss, root.model.head_weight)
    for p in root.model.parameters():
        p.register_hook(functools.partial(_gather, p))


def _gather(p: torch.nn.Parameter, _: torch.Tensor) -> None:
    if p.ds_status.name == "NOT_AVAILABLE":
        p.all_gather()


class _WithLoss(nn.Module):
    """Model and loss as one module: what DeepSpeed wraps must hold every use of a parameter."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model, self.loss = model, _Loss(model)

    def forward(self, batch: Batch, targets_GS: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
        hidden, reports = hidden_states(self.model, drawn(batch, self.model.draws), dtype)
        loss, apart = self.loss(hidden, targets_GS, dtype)
        return loss, with_consistency(reports, apart)


class _Loss(nn.Module):
    """The output projection and the loss. A module of its own, so that ZeRO-3 gathers the projection only around it."""

    def __init__(self, model: Transformer):
        super().__init__()
        self._model = (model,)  # a tuple hides it from nn.Module

    def forward(self, hidden_GSD: torch.Tensor, targets_GS: torch.Tensor,
                dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        model = self._model[0]
        return losses_of_draws(hidden_GSD, model.head_weight, targets_GS, dtype, model.draws)
