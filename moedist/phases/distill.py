"""Let smaller experts learn from the larger ones they come from, layer by layer, before training goes on.

Every layer's new experts see the rows that its old ones see and are fitted to what those made of them (FitNets, Romero et
al. 2015, arXiv 1412.6550, with whole layers instead of hints). The model's activations stay those of the old experts, so the
layers learn side by side and nothing but dispatch travels.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch

from moedist.config import CompressConfig
from moedist.engine import AdamW, replace_experts
from moedist.model import Bank
from moedist.phases.calibrate import Source, primaries_only, watching
from moedist.phases.run import Run
from moedist.phases.shrink import Shrunk


def distill(run: Run, shrunk: Shrunk, c: CompressConfig, source: Source) -> tuple[float, float]:
    """Put the new experts in place and fit them for `c.distill_steps` passes. Every rank must call it.

    Returns:
        Mean squared difference between new and old outputs over all layers, in the first and in the last pass.
    """
    layers = dict(run.model.moe_layers())
    teachers = {i: moe.bank for i, moe in layers.items()}
    replace_experts(run.engine, shrunk.compressed)
    students = {i: moe.bank for i, moe in layers.items()}
    pupils = {i: _Pupil(bank, c.distill_lr) for i, bank in students.items() if sum(p.numel() for p in bank.parameters())}
    errors: list[float] = []
    run.model.eval()
    try:
        for i, moe in layers.items():
            moe.place(teachers[i], moe.dispatcher)
        with torch.no_grad(), primaries_only(run.model), watching(pupils, run.model):
            for step, (batch, _) in enumerate(source.batches(run.model, run.world)):
                for pupil in pupils.values():
                    pupil.at(1 - step / c.distill_steps)
                with torch.autocast(run.world.device.type, dtype=run.dtype, enabled=run.low_precision):
                    run.model(batch.to(run.world.device))
                sums = torch.tensor([[p.error, p.values] for p in pupils.values()] or [[0.0, 0.0]], dtype=torch.float64).sum(0)
                run.world.all_reduce_(sums)
                errors.append((sums[0] / sums[1].clamp(min=1)).item())
    finally:
        for i, moe in layers.items():
            moe.place(students[i], moe.dispatcher)
        run.model.train()
    run.engine.copies.send_weights()
    return errors[0], errors[-1]


class _Pupil:
    """The new experts of one layer of this rank. The rate falls to 0; the moments are the fit's own, not training's."""

    def __init__(self, bank: Bank, lr: float):
        self.bank, self.lr = bank, lr
        self.optimizer = AdamW(bank.parameters(), lr=lr, weight_decay=0.0)

    def at(self, part: float) -> None:
        self.optimizer.param_groups[0]["lr"] = self.lr * part
        self.error = self.values = 0.0

    def __call__(self, rows_RD: torch.Tensor, y_RD: torch.Tensor, counts: Sequence[int], _: Any) -> torch.Tensor:
        if not len(rows_RD):
            return y_RD
        with torch.enable_grad():
            error = (self.bank(rows_RD.detach(), counts).float() - y_RD.detach().float()).square().sum()
            (error / y_RD.numel()).backward()
        self.optimizer.step()
        for weight in self.bank.parameters():
            weight.grad = None
        self.error, self.values = self.error + error.item(), self.values + y_RD.numel()
        return y_RD
