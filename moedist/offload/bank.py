"""A bank whose experts are fetched when they have rows, one at a time: the results of the bank that holds them all."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Callable, ContextManager, Optional, Sequence

import torch

from moedist.compress import LowBit
from moedist.errors import CompressError
from moedist.model import Bank, BankTensors
from moedist.model.activations import ACTIVATIONS
from moedist.model.forms import PARTS, by_part
from moedist.model.grouped_ffn import forward_groups, grouped_ffn
from moedist.model.lowbit_ffn import lowbit_ffn
from moedist.model.threads import as_in_threads
from moedist.offload.cache import Cache
from moedist.offload.pieces import Piece, PieceId


class OffloadedBank(Bank):
    """Experts of the forms of another bank, dense or in few bits. It has no parameters: forward alone.

    Attributes:
        cache: where experts come from.
        pieces: how the bytes of each are tensors.
    """

    restores = True

    def __init__(self, bank: Bank, pieces: dict[PieceId, Piece], cache: Cache):
        super().__init__(bank.layer, bank.expert_ids, bank.forms, bank.width, bank.activation, bank.device)
        self.pieces, self.cache = pieces, cache

    def forward(self, rows_RD: torch.Tensor, counts: Sequence[int], timed: Callable[[], ContextManager] = nullcontext,
                restored_R: Optional[torch.Tensor] = None) -> torch.Tensor:
        """See `LowBitBank.forward`. Compensators are fetched only where a row of their expert is restored."""
        if torch.is_grad_enabled() and rows_RD.requires_grad:
            raise CompressError("experts outside the device have no backward pass: train and watch them with "
                                "offload.store=none")
        out, start, rows = torch.empty_like(rows_RD), 0, {}
        for e, count in zip(self.expert_ids, counts):
            if count:
                rows[e] = slice(start, start + count)
            start += count
        # those that are there first: what has to be fetched then evicts none of them
        order = sorted(rows, key=lambda e: (PieceId(self.layer, e, False) not in self.cache, e))

        def run() -> None:
            for e in order:
                out[rows[e]] = self._through(e, rows_RD[rows[e]], None if restored_R is None else restored_R[rows[e]])

        jobs = len(rows)
        if all(form.is_dense for form in self.forms):  # as the bank of these would share the work between threads
            jobs = len(forward_groups(counts, self.widths, ACTIVATIONS[self.activation]))
        with timed():
            as_in_threads(run, jobs, rows_RD.device)
        return out

    def blocks_of(self, expert: int, tensors: BankTensors) -> BankTensors:
        raise CompressError(f"expert {expert} of layer {self.layer} is outside the device: set offload.store=none for this")

    def _through(self, expert: int, x: torch.Tensor, flags: Optional[torch.Tensor]) -> torch.Tensor:
        form = self.form_of(expert)
        weights, more = (PieceId(self.layer, expert, compensators) for compensators in (False, True))
        if form.is_lowbit:
            restored = None if flags is None or bool(flags.all()) else flags.nonzero().squeeze(1)
            wanted = [weights, *([more] if more in self.pieces and (restored is None or len(restored)) else [])]
        else:
            wanted = [weights]
        tensors = {}
        for piece in wanted:
            tensors.update(self.pieces[piece].views(self.cache.take(piece)))
        try:
            if not form.is_lowbit:
                return grouped_ffn(x, tensors["w_in"], tensors["w_out"], [len(x)], [form.hidden], self.activation)
            fields = by_part(tensors)
            parts = {part: LowBit.of(fields[part], form.hidden, form.width, part == "down") for part in PARTS[form.gated]}
            return lowbit_ffn(x, parts, self.activation, restored)
        finally:
            for piece in wanted:
                self.cache.give_back(piece)
