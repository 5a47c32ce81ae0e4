"""How many bytes of experts a token needs: what a device must fetch that holds none of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Iterator

import torch

from moedist.model import ExpertForm, MoELayer, Transformer
from moedist.phases.shrink import merged
from moedist.routing import Assignment, Router, most_trusted
from moedist.world import World


@dataclass
class Routed:
    """Tokens of this rank's part of some batches, and the rows they sent: [E] of every layer, all and those to be restored."""

    tokens: int = 0
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    restored: dict[int, torch.Tensor] = field(default_factory=dict)

    def bytes_per_token(self, model: Transformer, world: World, itemsize: int = 2) -> float:
        """Mean over all tokens of the bytes of their experts, each fetched for itself; compensators where they are used.
        Collective.

        Args:
            itemsize: of a number that is not in few bits.
        """
        sizes = {(i, e): _sizes(bank.form_of(e), itemsize) for i, bank in model.banks.items() for e in bank.expert_ids}
        everywhere = merged(world.gather_objects(sizes))
        total = torch.tensor([float(sum(int(self.rows[i][e]) * base + int(self.restored[i][e]) * more
                                        for (i, e), (base, more) in everywhere.items() if i in self.rows)),
                              float(self.tokens)], dtype=torch.float64)
        world.all_reduce_(total)
        return float(total[0] / total[1].clamp(min=1))


@contextlib.contextmanager
def counting(model: Transformer) -> Iterator[Routed]:
    """Count what routers decide for a while."""
    routed, hooks = Routed(), []
    first = next(iter(dict(model.moe_layers())))

    def seen(layer: int, moe: MoELayer):
        def hook(router: Router, inputs: tuple, assignment: Assignment) -> None:
            if layer == first and router is moe.router and not inputs[0].iteration:
                routed.tokens += inputs[0].vocab_ids_GS.numel()
            experts = moe.router.experts
            trusted = torch.ones_like(assignment.expert_ids_N, dtype=torch.bool)
            if moe.restored is not None:
                trusted = most_trusted(assignment.token_ids_N, assignment.weights_N, moe.restored)
            for where, of in ((routed.rows, assignment.expert_ids_N), (routed.restored, assignment.expert_ids_N[trusted])):
                where[layer] = where.get(layer, 0) + torch.bincount(of, minlength=experts).cpu()
        return hook

    try:
        for layer, moe in model.moe_layers():
            hooks += [router.register_forward_hook(seen(layer, moe)) for router in moe.routers]
        yield routed
    finally:
        for hook in hooks:
            hook.remove()


def _sizes(form: ExpertForm, itemsize: int) -> tuple[int, int]:
    """Bytes without compensators, and of those."""
    factors = [name for name, _ in form.tensors if name.partition(".")[2].startswith(("left", "right"))]
    compensators = form.weight_bytes(itemsize, factors) if form.is_lowbit else 0
    return form.weight_bytes(itemsize) - compensators, compensators
