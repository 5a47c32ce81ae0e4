"""AdamW for the experts of this rank, apart from the dense parameters: experts come and go while training goes on."""

from __future__ import annotations

from typing import Mapping

import torch

from moedist.config import TrainConfig
from moedist.model import Bank, BankTensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(groups: list[dict], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW whose state is made now, so that a checkpoint can be read before the first step."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, eps=config.eps, betas=(config.beta1, config.beta2),
                                  fused=device.type in ("cpu", "cuda"))
    for group in optimizer.param_groups:
        for p in group["params"]:
            step_device = p.device if group["fused"] else "cpu"
            optimizer.state[p] = {"step": torch.zeros((), device=step_device),
                                  **{moment: torch.zeros_like(p) for moment in MOMENTS}}
    return optimizer


class ExpertOptimizer:
    """Holds the banks' Adam moments. `banks` is the model's own dict of this rank's experts by layer."""

    def __init__(self, banks: Mapping[int, Bank], config: TrainConfig, device: torch.device):
        self.banks, self._config, self._device = banks, config, device
        self._make()

    def _make(self) -> None:
        params = [p for p in self.parameters() if p.numel()]
        group = {"params": params, "weight_decay": self._config.weight_decay}
        self._adamw = adamw([group], self._config, self._device) if params else None

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for bank in self.banks.values() for p in bank.parameters()]

    def step(self, lr: float) -> None:
        if self._adamw is not None:
            self._adamw.param_groups[0]["lr"] = lr
            self._adamw.step()

    def tensors(self, layer: int) -> list[BankTensors]:
        """Weights, then each Adam moment, of the experts of a layer: detached views that can be written."""
        bank = self.banks[layer]
        return [bank.weights(), *(self._moment(bank, moment) for moment in MOMENTS)]

    def rebuild(self, moments: Mapping[int, list[BankTensors]], updates: float) -> None:
        """Go on with the banks as they are now, and these moments of each layer.

        Args:
            updates: optimizer steps done, for Adam's bias correction.
        """
        self._make()
        for layer, of_layer in moments.items():
            for moment, sources in zip(MOMENTS, of_layer):
                for target, source in zip(self._moment(self.banks[layer], moment), sources):
                    target.copy_(source)
        self.set_updates(updates)

    def set_updates(self, updates: float) -> None:
        for state in self._adamw.state.values() if self._adamw is not None else ():
            state["step"].fill_(updates)

    def _moment(self, bank: Bank, moment: str) -> BankTensors:
        if not bank.expert_ids:
            return bank.weights()  # no experts here, so no state: empty all the same
        return tuple(self._adamw.state[p][moment] for p in bank.parameters())
