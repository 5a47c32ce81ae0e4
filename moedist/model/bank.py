"""What all banks of experts have in common. A bank holds the experts that one rank owns in one layer.

Expert parameters are kept out of the module tree that the engine replicates: they live on their owner alone and have an
optimizer of their own. Their global names, `layers.3.experts.17.w1`, hold whatever the placement. The kinds of banks
differ in how they lay out their parameters, but an expert's numbers come in the same order in all of them, that of its
form: so an expert moves from one kind to another as a run of numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Callable, ContextManager, Iterable, Sequence

import torch
from torch import nn

from moedist.compress import Compressed
from moedist.model.forms import ExpertForm, expert_prefix
from moedist.model.initialise import fill_normal

BankTensors = tuple[torch.Tensor, ...]  # shaped like a bank's parameters: the weights, a gradient, an Adam moment


class Bank(nn.Module):
    """Experts of any forms.

    Attributes:
        layer: index of the transformer block.
        expert_ids: global ids of the experts held here, ascending; may be empty.
        forms: of each.
        width: D.
        restores: whether `forward` takes a fourth argument, the rows that compensators are for.
        indices: int32, the index vectors of all, one after another. At first every vector is 0, 1, ..., a valid one.
    """

    restores = False

    def __init__(self, layer: int, expert_ids: Sequence[int], forms: Sequence[ExpertForm], width: int, activation: str,
                 device: torch.device | str):
        super().__init__()
        self.layer, self.expert_ids, self.forms = layer, list(expert_ids), list(forms)
        self.width, self.activation = width, activation
        vectors = [torch.arange(length, dtype=torch.int32) for form in self.forms for _, length in form.indices]
        self.register_buffer("indices", torch.cat(vectors or [torch.zeros(0, dtype=torch.int32)]).to(device))

    @abstractmethod
    def forward(self, rows_RD: torch.Tensor, counts: Sequence[int],
                timed: Callable[[], ContextManager] = nullcontext) -> torch.Tensor:
        """[R, D]: rows sorted by expert, `counts[i]` of them for `expert_ids[i]`, through their experts."""

    @abstractmethod
    def blocks_of(self, expert: int, tensors: BankTensors) -> BankTensors:
        """The numbers of one expert (a global id held here) in tensors shaped like the parameters, as views."""

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def widths(self) -> list[int]:
        """Hidden neurons of each expert."""
        return [form.hidden for form in self.forms]

    @property
    def flops_per_row(self) -> list[int]:
        """Multiply-adds times two of one row, forward, for each expert."""
        return [form.flops_per_row for form in self.forms]

    def weights(self) -> BankTensors:
        """The parameters, detached."""
        return tuple(p.detach() for p in self.parameters())

    def form_of(self, expert: int) -> ExpertForm:
        return self.forms[self.expert_ids.index(expert)]

    def indices_of(self, expert: int) -> torch.Tensor:
        """The index vectors of one expert in one, as a view."""
        i = self.expert_ids.index(expert)
        start = sum(form.index_numbers for form in self.forms[:i])
        return self.indices[start:start + self.forms[i].index_numbers]

    def split(self, expert: int, tensors: BankTensors) -> dict[str, torch.Tensor]:
        """One expert in tensors shaped like the parameters: views by the names of its form."""
        return self.form_of(expert).split(self.blocks_of(expert, tensors))

    def split_by_name(self, tensors: BankTensors, experts: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Views of tensors shaped like the parameters by global name, of all experts here or of `experts`."""
        return {expert_prefix(self.layer, e) + name: view for e in (self.expert_ids if experts is None else experts)
                for name, view in self.split(e, tensors).items()}

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Detached views of the weights by global name; writing to them writes the bank."""
        return self.split_by_name(self.weights())

    def named_indices(self) -> dict[str, torch.Tensor]:
        """Views of the index vectors by global name; writing to them writes the bank."""
        return {expert_prefix(self.layer, e) + name: view for e in self.expert_ids
                for name, view in self.form_of(e).split_indices(self.indices_of(e)).items()}

    def stored(self, expert: int, hidden: int | None = None) -> Compressed:
        """One expert as compression sees it, in views; `hidden` are its neurons before any compression, if known."""
        form = self.form_of(expert)
        return form.stored(self.split(expert, self.weights()), form.split_indices(self.indices_of(expert)),
                           form.hidden if hidden is None else hidden)

    @torch.no_grad()
    def initialise(self, seed: int, std: float, out_std: float) -> None:
        """Normal weights drawn from (seed, global name): the same for any placement."""
        for name, tensor in self.named_weights().items():
            fill_normal(tensor, out_std if ".w2" in name else std, seed, name)


def joined(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The numbers of blocks one after another, 1-D."""
    return torch.cat([block.reshape(-1) for block in blocks])


def spread(flat: torch.Tensor, blocks: Sequence[torch.Tensor]) -> None:
    """Write the numbers of `joined` blocks into others, whose shapes may differ."""
    for block, values in zip(blocks, flat.split([block.numel() for block in blocks])):
        block.copy_(values.view_as(block))
