"""From a batch to the sum of its losses: what is trained, evaluated and calibrated on."""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch import nn

from moedist.model import Batch, KVCache, LayerReport, Transformer, next_token_loss_sum
from moedist.timing import region

Reports = dict[int, LayerReport]  # of every MoE layer


def forward_loss(model: Transformer, batch: Batch, targets_GS: torch.Tensor, device: torch.device,
                 dtype: torch.dtype) -> tuple[torch.Tensor, Reports]:
    """(sum of next-token losses, layer reports) of a batch of CPU tensors, computed in `dtype` on `device`."""
    hidden, reports = hidden_states(model, batch.to(device), dtype)
    with whole(model.head_weight) as weight_VD:
        return loss_sum(hidden, weight_VD, targets_GS.to(device), dtype), reports


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
