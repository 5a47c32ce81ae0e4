"""The bank of dense experts, and the choice between it and the bank of experts in any form."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Callable, ContextManager, Sequence

import torch
from torch import nn

from moedist.model.activations import ACTIVATIONS
from moedist.model.bank import Bank, BankTensors
from moedist.model.factored import FactoredBank
from moedist.model.forms import ExpertForm
from moedist.model.grouped_ffn import grouped_ffn
from moedist.model.lowbit import LowBitBank


class ExpertBank(Bank):
    """Dense feed-forward experts with their neurons stored one after another; widths may differ.

    Args:
        widths: hidden neurons of each.
        forms: of each, where some have index vectors; their widths are `widths`.

    Attributes:
        w_in, w_out: see `moedist.model.grouped_ffn`.
    """

    def __init__(self, layer: int, expert_ids: Sequence[int], width: int, widths: Sequence[int], activation: str,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 forms: Sequence[ExpertForm] | None = None):
        gate, neurons = ACTIVATIONS[activation], sum(widths)
        forms = forms if forms is not None else [ExpertForm.dense(width, hidden, gate == 2) for hidden in widths]
        super().__init__(layer, expert_ids, forms, width, activation, device)
        self.w_in = nn.Parameter(torch.empty(gate * neurons, width, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(neurons, width, device=device, dtype=dtype))

    def forward(self, rows_RD: torch.Tensor, counts: Sequence[int],
                timed: Callable[[], ContextManager] = nullcontext) -> torch.Tensor:
        dtype = rows_RD.dtype
        return grouped_ffn(rows_RD, self.w_in.to(dtype), self.w_out.to(dtype), counts, self.widths, self.activation, timed)

    def blocks_of(self, expert: int, tensors: BankTensors) -> BankTensors:
        """(gate and up rows, or the only input rows; down rows), each [.., D]."""
        i, gate = self.expert_ids.index(expert), ACTIVATIONS[self.activation]
        start = sum(self.widths[:i])
        stop = start + self.widths[i]
        w_in, w_out = tensors
        return w_in[gate * start:gate * stop], w_out[start:stop]


def build_bank(layer: int, expert_ids: Sequence[int], forms: Sequence[ExpertForm], width: int, activation: str,
               device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Bank:
    """A bank, not filled, for experts of these forms: of the dense kind where all are dense, since that is faster.

    Raises:
        ValueError: some are in few bits, and some not.
    """
    if any(form.is_lowbit for form in forms):
        if not all(form.is_lowbit for form in forms):
            raise ValueError(f"of the experts of layer {layer}, some are in few bits and some not: compress all of a run")
        return LowBitBank(layer, expert_ids, forms, width, activation, device)
    if all(form.is_dense for form in forms):
        return ExpertBank(layer, expert_ids, width, [form.hidden for form in forms], activation, device, dtype, forms)
    return FactoredBank(layer, expert_ids, forms, width, activation, device, dtype)
