"""The optimizer of this rank's experts, apart from the dense parameters: experts come and go while training goes on."""

from __future__ import annotations

from typing import Mapping

import torch

from moedist.config import TrainConfig
from moedist.engine.optimizer import MOMENTS, build_optimizer, make_state, moments_of, set_updates
from moedist.model import Bank, BankTensors

__all__ = ["MOMENTS", "ExpertOptimizer"]


class ExpertOptimizer:
    """Holds the banks' Adam moments. `banks` is the model's own dict of this rank's experts by layer."""

    def __init__(self, banks: Mapping[int, Bank], config: TrainConfig, device: torch.device):
        self.banks, self._config, self._device = banks, config, device
        self._moments = moments_of(config)
        self._make()

    def _make(self) -> None:
        params = [p for p in self.parameters() if p.numel()]
        self._optimizer = None
        if params:
            group = {"params": params, "weight_decay": self._config.weight_decay}
            self._optimizer = build_optimizer([group], self._config, self._device)
            make_state(self._optimizer, params, self._config)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for bank in self.banks.values() for p in bank.parameters()]

    def step(self, lr: float) -> None:
        if self._optimizer is not None:
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()

    def tensors(self, layer: int) -> list[BankTensors]:
        """Weights, then each Adam moment (none with SGD), of the experts of a layer: detached views that can be written."""
        bank = self.banks[layer]
        return [bank.weights(), *(self._moment(bank, moment) for moment in self._moments)]

    def rebuild(self, moments: Mapping[int, list[BankTensors]], updates: float) -> None:
        """Go on with the banks as they are now, and these moments of each layer.

        Args:
            updates: optimizer steps done, for Adam's bias correction.
        """
        self._make()
        for layer, of_layer in moments.items():
            for moment, sources in zip(self._moments, of_layer):
                for target, source in zip(self._moment(self.banks[layer], moment), sources):
                    target.copy_(source)
        self.set_updates(updates)

    def set_updates(self, updates: float) -> None:
        if self._optimizer is not None:
            set_updates(self._optimizer, updates)

    def _moment(self, bank: Bank, moment: str) -> BankTensors:
        if not bank.expert_ids:
            return bank.weights()  # no experts here, so no state: empty all the same
        return tuple(self._optimizer.state[p][moment] for p in bank.parameters())
