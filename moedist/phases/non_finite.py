"""Where a value that is not finite came up first: the step is repeated, and everything is looked at on its way.

Nothing is looked at while training goes well, so it costs nothing then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Sequence

import torch

from moedist.model import Bank, MoELayer, PooledLayer
from moedist.routing import Assignment

if TYPE_CHECKING:
    from moedist.phases.run import Run

ATTENTION, ROUTER, EXPERT, OUTPUT = range(4)  # of a block, in the order they are computed
PARTS = ("attention", "router", "experts", "output")


@dataclass(frozen=True, order=True)
class Origin:
    """The first value that is not finite.

    Attributes:
        place: what orders places in the order of computing.
        rank: where it came up.
        layer, expert: -1 where it is in none.
        part: in words.
        weights: names of weights there that are not finite themselves.
    """

    place: tuple[int, int]
    rank: int
    layer: int = -1
    expert: int = -1
    part: str = ""
    weights: tuple[str, ...] = ()

    def describe(self, rank_name: Callable[[int], str]) -> str:
        """first not finite in layer 1, expert 5 on rank 1 (node7, cuda:0), whose weights w1 are not finite"""
        if not self.part:
            return "no value of a repeated forward pass is not finite, so it came up in gradients or optimizer state"
        where = ", ".join([f"layer {self.layer}"] * (self.layer >= 0)
                          + [f"expert {self.expert}" if self.expert >= 0 else self.part])
        return f"first not finite in {where} on {rank_name(self.rank)}" + (
            f", whose weights {', '.join(self.weights)} are not finite" if self.weights else "")


def find_non_finite(run: "Run") -> Origin:
    """Repeat the step that was just done, forward and, where that is finite, backward. Every rank must call it.

    Its batch and seeds are known, and its weights are as they were where the step was skipped. Gradients are cleared.
    """
    mine = _Forward(run).look()
    found = _first(run, mine)
    if not found.part and run.config.engine.name == "torch":  # DeepSpeed reduces gradients before they can be looked at
        found = _first(run, _in_gradients(run))
    return found


def _first(run: "Run", mine: Origin | None) -> Origin:
    every = [origin for origin in run.world.gather_objects(mine) if origin is not None]
    return min(every, default=Origin((0, 0), run.world.rank))


class _Forward:
    """Looks at a forward pass on this rank."""

    def __init__(self, run: "Run"):
        self.run, self.found = run, None

    @torch.no_grad()
    def look(self) -> Origin | None:
        model, layers = self.run.model, self.run.config.model.layers
        hooks = []
        try:
            for i, block in enumerate(model.layers):
                hooks.append(block.attention.register_forward_hook(self._hook(i, ATTENTION)))
                hooks.append(block.register_forward_hook(self._hook(i, OUTPUT)))
                if isinstance(block.ffn, (MoELayer, PooledLayer)):
                    hooks.append(block.ffn.router.register_forward_hook(self._hook(i, ROUTER)))
                if isinstance(block.ffn, MoELayer):
                    block.ffn.watch = self._watch(i, block.ffn.bank)
            for batch, targets in self.run.batches_before():
                loss, _ = self.run.engine.forward(batch, targets, self.run.dtype)
                self._look((layers, 0), loss, part="the loss")
        finally:
            for hook in hooks:
                hook.remove()
            for _, moe in model.moe_layers():
                moe.watch = None
        return self.found

    def _hook(self, layer: int, part: int) -> Callable[..., None]:
        def look(module: Any, _: Any, result: Any) -> None:
            result = result.weights_N if isinstance(result, Assignment) else result[0] if isinstance(result, tuple) else result
            bad = [] if self.found else [name for name, p in module.named_parameters() if not _finite(p)]
            self._look((layer, part), result, layer, part=PARTS[part], weights=bad if part != OUTPUT else [])

        return look

    def _watch(self, layer: int, bank: Bank) -> Callable[..., torch.Tensor]:
        def look(rows_RD: torch.Tensor, results_RD: torch.Tensor, counts: list[int], routed: Assignment) -> torch.Tensor:
            for expert, given, results in zip(bank.expert_ids, rows_RD.split(counts), results_RD.split(counts)):
                if self.found is None and not _finite(results) and _finite(given):
                    bad = [name for name, w in bank.split(expert, bank.weights()).items() if not _finite(w)]
                    self._look((layer, EXPERT), results, layer, expert, PARTS[EXPERT], bad)
            return results_RD

        return look

    def _look(self, place: tuple[int, int], value: torch.Tensor, layer: int = -1, expert: int = -1, part: str = "",
              weights: Sequence[str] = ()) -> None:
        if self.found is None and not _finite(value):
            self.found = Origin(place, self.run.world.rank, layer, expert, part, tuple(weights))


def _in_gradients(run: "Run") -> Origin | None:
    """The last layer whose gradients on this rank are not finite: the first that the backward pass comes to."""
    tokens = run.config.train.batch * run.config.data.sequence_length
    for batch, targets in run.batches_before():
        loss, _ = run.engine.forward(batch, targets, run.dtype)
        run.engine.backward(loss / tokens)
    layers, found = run.config.model.layers, []
    for layer, bank in run.model.banks.items():
        gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in bank.parameters())
        for expert in bank.expert_ids:
            if not all(_finite(g) for g in bank.split(expert, gradients).values()):
                found.append(Origin((layers - layer, 0), run.world.rank, layer, expert, "gradients"))
    for name, p in run.engine.dense.items():
        if p.grad is not None and not _finite(p.grad):
            layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
            found.append(Origin((layers - layer, 1), run.world.rank, layer, -1, f"gradients of {name}"))
    for p in (*run.model.parameters(), *(p for bank in run.model.banks.values() for p in bank.parameters())):
        p.grad = None
    return min(found, default=None)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
