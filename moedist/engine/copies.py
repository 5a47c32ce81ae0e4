"""Copies of an expert: their gradients are summed on its primary, the one rank that updates it and sends the weights back.

So the copies are bitwise equal by construction, also where ranks of several kinds round differently. Both ways are one
exchange of all layers' copies; nothing is exchanged where the plan has none.
"""

from __future__ import annotations

import torch

from moedist.model import BankTensors, Transformer


class Copies:
    """The copies in a model's current placement, as one rank sees them."""

    def __init__(self, model: Transformer):
        layers = list(model.moe_layers())
        self._model = model
        self.any = any(moe.dispatcher.layout.has_copies for _, moe in layers)
        if not self.any:
            return
        self._transport = layers[0][1].dispatcher.transport
        rank, size = self._transport.rank, self._transport.world_size
        # by rank: (layer, expert) that this rank has a copy of and r the primary, and the other way round
        self._primary_at: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        self._copy_at: list[list[tuple[int, int]]] = [[] for _ in range(size)]
        for layer, moe in layers:
            plan = moe.dispatcher.layout.plan
            for e, (primary, ranks) in enumerate(zip(plan.primaries, plan.owners)):
                others = [r for r in ranks if r != primary]
                if rank in others:
                    self._primary_at[primary].append((layer, e))
                if rank == primary:
                    for other in others:
                        self._copy_at[other].append((layer, e))

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Add the copies' gradients to the primary's, in rank order, and clear the copies': the norm counts them once."""
        if not self.any:
            return
        gradients = {layer: tuple(p.grad for p in bank.parameters()) for layer, bank in self._model.banks.items()}
        received = self._exchange(gradients, self._primary_at, self._copy_at)
        for here, there in received:
            here.add_(there)
        for layer, e in (found for at in self._primary_at for found in at):
            for block in self._model.banks[layer].blocks_of(e, gradients[layer]):
                block.zero_()

    @torch.no_grad()
    def send_weights(self) -> None:
        """Overwrite the copies with their primary's weights."""
        if not self.any:
            return
        weights = {layer: bank.weights() for layer, bank in self._model.banks.items()}
        for here, there in self._exchange(weights, self._copy_at, self._primary_at):
            here.copy_(there)

    def _exchange(self, tensors: dict[int, BankTensors], send: list[list[tuple[int, int]]],
                  receive: list[list[tuple[int, int]]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Send blocks of `tensors` to every rank; returns (block here, block that arrived for it), by rank."""
        outgoing, incoming = ([self._blocks(tensors, found) for found in by_rank] for by_rank in (send, receive))
        flat = [block.reshape(-1) for blocks in outgoing for block in blocks]
        like = next(iter(tensors.values()))[0]
        buffer = torch.cat(flat) if flat else like.new_empty(0)
        sizes = [[sum(b.numel() for b in blocks) for blocks in by_rank] for by_rank in (outgoing, incoming)]
        out = like.new_empty(sum(sizes[1]))
        self._transport.exchange(buffer, *sizes, out=out)
        here = [block for blocks in incoming for block in blocks]
        there = out.split([block.numel() for block in here])
        return [(h, t.view_as(h)) for h, t in zip(here, there)]

    def _blocks(self, tensors: dict[int, BankTensors], found: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [block for layer, e in found for block in self._model.banks[layer].blocks_of(e, tensors[layer])]
