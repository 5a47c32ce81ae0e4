"""From a batch to the sum of its losses: what is trained, evaluated and calibrated on."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Iterator

import torch
from torch import nn

from moedist.model import Batch, KVCache, LayerReport, Transformer, consistency_loss_sum, next_token_loss_sum
from moedist.timing import region

Reports = dict[int, LayerReport]  # of every MoE layer
DRAW_BITS = 48  # places of tokens in a batch are below that


def forward_loss(model: Transformer, batch: Batch, targets_GS: torch.Tensor, device: torch.device,
                 dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
    """(sum of next-token losses, layer reports) of a batch of CPU tensors, computed in `dtype` on `device`."""
    hidden, reports = hidden_states(model, batch.to(device), dtype)
    with whole(model.head_weight) as weight_VD:
        return loss_sum(hidden, weight_VD, targets_GS.to(device), dtype), reports


def training_loss(model: Transformer, batch: Batch, targets_GS: torch.Tensor, device: torch.device,
                  dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
    """As `forward_loss`, of a training pass: where routers draw their experts anew (`Router.draws`), all draws at once."""
    draws = model.draws
    hidden, reports = hidden_states(model, drawn(batch.to(device), draws), dtype)
    with whole(model.head_weight) as weight_VD:
        loss, apart = losses_of_draws(hidden, weight_VD, targets_GS.to(device), dtype, draws)
    return loss, with_consistency(reports, apart)


def drawn(batch: Batch, draws: int) -> Batch:
    """The batch, `draws` times one after the other, with other noise each time: as so many passes, in one."""
    if draws == 1:
        return batch
    keys_GS = torch.cat([batch.keys_GS + (i << DRAW_BITS) for i in range(draws)])
    return Batch(batch.ids_GS.repeat(draws, 1), keys_GS, batch.seed)


def losses_of_draws(hidden_GSD: torch.Tensor, head_VD: torch.Tensor, targets_GS: torch.Tensor, dtype: torch.dtype,
                    draws: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(mean over draws of the sum of next-token losses, how much the predictions of two draws differ, summed over tokens)."""
    if draws == 1:
        return loss_sum(hidden_GSD, head_VD, targets_GS, dtype), None
    loss = loss_sum(hidden_GSD, head_VD, targets_GS.repeat(draws, 1), dtype) / draws
    with region("dense"):
        first, second = (part.flatten(0, 1).to(dtype) for part in hidden_GSD.chunk(draws))
        return loss, consistency_loss_sum(first, second, head_VD, targets_GS.flatten())


def with_consistency(reports: Reports, apart: torch.Tensor | None) -> Reports:
    """The reports, with that loss in the first layer's: its router says what it weighs."""
    if apart is None:
        return reports
    layer, report = next(iter(reports.items()))
    return {**reports, layer: dataclasses.replace(report, aux_losses={**report.aux_losses, "consistency": apart})}


def hidden_states(model: nn.Module, batch: Batch, dtype: torch.dtype,
                  cache: KVCache | None = None) -> tuple[torch.Tensor, Reports]:
    """([G, S, D], layer reports). Weights of the model stay as they are, low precision is for what is computed."""
    with torch.autocast(batch.ids_GS.device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        return model(batch) if cache is None else model(batch, cache)


def loss_sum(hidden_GSD: torch.Tensor, head_VD: torch.Tensor, targets_GS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over all tokens of a batch."""
    with region("dense"):
        return next_token_loss_sum(hidden_GSD.flatten(0, 1).to(dtype), head_VD, targets_GS.flatten())


@contextlib.contextmanager
def whole(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A weight that ZeRO-3 may have partitioned, in full; then every rank must enter."""
    if not hasattr(weight, "ds_id"):  # DeepSpeed marks what it has partitioned
        yield weight
        return
    import deepspeed
    with deepspeed.zero.GatheredParameters(weight):
        yield weight
