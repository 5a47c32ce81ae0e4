"""The bank of experts that one rank owns in one layer.

Expert parameters are kept out of the module tree that the engine replicates: they live on their owner alone and have an
optimizer of their own. Their global names, `layers.3.experts.17.w1`, hold whatever the placement.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Callable, ContextManager, Sequence

import torch
from torch import nn

from moedist.model.grouped_ffn import ACTIVATIONS, grouped_ffn
from moedist.model.initialise import fill_normal


class ExpertBank(nn.Module):
    """Feed-forward experts with their neurons stored one after another; widths may differ.

    Attributes:
        layer: index of the transformer block.
        expert_ids: global ids of the experts held here, ascending; may be empty.
        widths: hidden neurons of each.
        w_in, w_out: see `moedist.model.grouped_ffn`.
    """

    def __init__(self, layer: int, expert_ids: Sequence[int], width: int, widths: Sequence[int], activation: str,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layer, self.expert_ids, self.widths = layer, list(expert_ids), list(widths)
        self.width, self.activation = width, activation
        neurons = sum(self.widths)
        self.w_in = nn.Parameter(torch.empty(ACTIVATIONS[activation] * neurons, width, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(neurons, width, device=device, dtype=dtype))

    def forward(self, rows_RD: torch.Tensor, counts: Sequence[int],
                timed: Callable[[], ContextManager] = nullcontext) -> torch.Tensor:
        """[R, D]: rows sorted by expert, `counts[i]` of them for `expert_ids[i]`, through their experts."""
        dtype = rows_RD.dtype
        return grouped_ffn(rows_RD, self.w_in.to(dtype), self.w_out.to(dtype), counts, self.widths, self.activation, timed)

    @property
    def flops_per_row(self) -> list[int]:
        """Multiply-adds times two of one row, forward, for each expert."""
        return [2 * self.width * width * (ACTIVATIONS[self.activation] + 1) for width in self.widths]

    def blocks_of(self, expert: int, w_in: torch.Tensor, w_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of one expert (a global id held here) in tensors shaped like the bank's weights, as views."""
        i, gate = self.expert_ids.index(expert), ACTIVATIONS[self.activation]
        start = sum(self.widths[:i])
        stop = start + self.widths[i]
        return w_in[gate * start:gate * stop], w_out[start:stop]

    def split_by_name(self, w_in: torch.Tensor, w_out: torch.Tensor,
                      experts: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Views of tensors shaped like the bank's weights (the weights, a gradient, an Adam moment) by global name.

        Of each expert, or of `experts` (global ids held here): w1 [F, D] gate (or the only input projection), w3 [F, D]
        up (swiglu), and w2 [F, D], the down projection with one row per hidden neuron.
        """
        named = {}
        for e in self.expert_ids if experts is None else experts:
            prefix = f"layers.{self.layer}.experts.{e}."
            inputs, named[prefix + "w2"] = self.blocks_of(e, w_in, w_out)
            named.update(zip((prefix + "w1", prefix + "w3"), inputs.chunk(ACTIVATIONS[self.activation])))
        return named

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Detached views of the weights by global name; writing to them writes the bank."""
        return self.split_by_name(self.w_in.detach(), self.w_out.detach())

    @torch.no_grad()
    def initialise(self, seed: int, std: float, out_std: float) -> None:
        """Normal weights drawn from (seed, global name): the same for any placement."""
        for name, tensor in self.named_weights().items():
            fill_normal(tensor, out_std if name.endswith("w2") else std, seed, name)
