"""Watch the experts work: what compression must know of the tokens that each of them sees, gathered in a distributed run.

Rows come to the expert's rank by dispatch, so sums over all ranks' tokens form where the expert is. Copies would each see a
part; for this time all rows of an expert go to its primary, the one that is compressed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Callable, Collection, Iterable, Iterator, Sequence

import torch

from moedist.compress import Calibration, Expert, calibrate, calibration_bytes
from moedist.data import TrainStream
from moedist.errors import CompressError
from moedist.model import Batch, MoELayer, Transformer
from moedist.phases.evaluation import EVAL_SEED, forward_loss
from moedist.placement import LayerPlan, equal_counts
from moedist.routing import Assignment
from moedist.world import World

Calibrations = dict[tuple[int, int], Calibration]  # by (layer, expert)


@dataclasses.dataclass(frozen=True)
class Source:
    """The sequences that experts are watched on: the next ones that training would read.

    Attributes:
        first: position of the first sequence; sequences: how many; part: how many in one pass over all ranks.
        dtype: of activations.
    """

    stream: TrainStream
    first: int
    sequences: int
    part: int
    dtype: torch.dtype

    def batches(self, model: Transformer, world: World) -> Iterator[tuple[Batch, torch.Tensor]]:
        """This rank's part of every pass, as CPU tensors: inputs and targets. As many passes on every rank."""
        for start in range(0, self.sequences, self.part):
            counts = equal_counts(min(self.part, self.sequences - start), world.size)
            offset = start + sum(counts[:world.rank])
            inputs, targets = self.stream.batch(self.first + offset, counts[world.rank])
            length = inputs.shape[1]
            keys = (offset + torch.arange(len(inputs))).unsqueeze(1) * length + torch.arange(length)
            yield Batch(inputs, keys, EVAL_SEED), targets


def watch_experts(model: Transformer, world: World, source: Source, layers: Collection[int], needs: Collection[str],
                  tick: Callable[[], None] = lambda: None) -> Calibrations:
    """Sums over the tokens of `source`, of every expert of `layers` that this rank is the primary of. Collective.

    Dropout and routing noise are off, the loss is a sum over tokens, and sums are float64 where the device has it: a near
    tie between neurons then falls the same way however the tokens are spread over ranks. Gradients are left cleared.

    Args:
        needs: fields of `Calibration` to fill.
        tick: called after every pass.

    Raises:
        CompressError: experts are in few bits.
    """
    low = any(form.is_lowbit for bank in model.banks.values() for form in bank.forms)
    if any(world.gather_objects(low)):  # a rank may have no experts
        raise CompressError("experts in few bits have no backward pass, and cannot be watched: take the run they were made of")
    was_training = model.training
    model.eval()
    watchers = {i: _Watcher(moe, needs) for i, moe in model.moe_layers() if i in layers}
    with primaries_only(model), frozen(model), watching({i: w for i, w in watchers.items()}, model):
        for batch, targets in source.batches(model, world):
            loss, _ = forward_loss(model, batch, targets, world.device, source.dtype)
            loss.backward()
            clear_gradients(model)
            tick()
    model.train(was_training)
    return {(i, e): calibration for i, w in watchers.items() for e, calibration in w.result(world).items()}


def watch_bytes(model: Transformer, layer: int, needs: Collection[str], itemsize: int = 8) -> int:
    """Memory that `watch_experts` takes for a layer on this rank."""
    moe = dict(model.moe_layers())[layer]
    forms = [moe.bank.form_of(e) for e in moe.dispatcher.layout.primary_experts]
    return sum(calibration_bytes(form.hidden, form.width, needs, form.gated, itemsize) for form in forms)


def clear_gradients(model: Transformer) -> None:
    for p in (*model.parameters(), *(p for bank in model.banks.values() for p in bank.parameters())):
        p.grad = None


@contextlib.contextmanager
def frozen(model: Transformer) -> Iterator[None]:
    """No gradients of dense parameters for a while: none is asked for, and an engine that reduces them sees none."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


@contextlib.contextmanager
def watching(watches: dict[int, Any], model: Transformer) -> Iterator[None]:
    """Let layers call their `watch`, and take it away in the end."""
    layers = dict(model.moe_layers())
    for i, watch in watches.items():
        layers[i].watch = watch
    try:
        yield
    finally:
        for i in watches:
            layers[i].watch = None


@contextlib.contextmanager
def primaries_only(model: Transformer) -> Iterator[None]:
    """Send all rows of an expert to its primary for a while."""
    before = [(moe, moe.dispatcher) for _, moe in model.moe_layers() if moe.dispatcher.layout.has_copies]
    for moe, dispatcher in before:
        plan = dispatcher.layout.plan
        shares = tuple(tuple(float(r == primary) for r in owners) for primary, owners in zip(plan.primaries, plan.owners))
        moe.place(moe.bank, dispatcher.for_layout(dispatcher.layout.with_plan(LayerPlan(plan.owners, shares))))
    try:
        yield
    finally:
        for moe, dispatcher in before:
            moe.place(moe.bank, dispatcher)


class _Watcher:
    """Sums of one layer. Called in the forward pass; its part of the backward pass does the summing."""

    def __init__(self, moe: MoELayer, needs: Collection[str]):
        self.moe, self.needs = moe, needs
        self.dtype = torch.float32 if moe.bank.device.type == "mps" else torch.float64
        self.primaries = moe.dispatcher.layout.primary_experts
        self.experts = {e: dense_expert(moe, e) for e in self.primaries}
        self.sums = {e: Calibration.zeros(expert.hidden, expert.width, needs, expert.gate is not None, self.dtype,
                                          moe.bank.device) for e, expert in self.experts.items()}
        self.weight_E = torch.zeros(moe.dispatcher.layout.plan.experts, dtype=torch.float64)

    def __call__(self, rows_RD: torch.Tensor, y_RD: torch.Tensor, counts: Sequence[int],
                 routed: Assignment) -> torch.Tensor:
        self.weight_E.index_add_(0, routed.expert_ids_N.cpu(), routed.weights_N.detach().cpu().double())
        return _Seen.apply(y_RD, rows_RD.detach(), list(counts), self)

    def add(self, rows_RD: torch.Tensor, grad_RD: torch.Tensor, counts: Sequence[int]) -> None:
        for e, x, grad in zip(self.moe.bank.expert_ids, rows_RD.split(list(counts)), grad_RD.split(list(counts))):
            if len(x):  # only primaries have any
                with torch.autocast(x.device.type, enabled=False):
                    self.sums[e] = self.sums[e] + calibrate(self.experts[e], x, grad, None, self.needs, self.dtype)

    def result(self, world: World) -> dict[int, Calibration]:
        weight_E = world.all_reduce_(self.weight_E)
        return {e: dataclasses.replace(c, weight=weight_E[e].to(c.rows.device)) for e, c in self.sums.items()}


class _Seen(torch.autograd.Function):
    """The identity on the experts' results, whose gradient is shown to a watcher on its way."""

    @staticmethod
    def forward(ctx: Any, y_RD: torch.Tensor, rows_RD: torch.Tensor, counts: list[int], watcher: _Watcher) -> torch.Tensor:
        ctx.save_for_backward(rows_RD)
        ctx.counts, ctx.watcher = counts, watcher
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple:
        ctx.watcher.add(ctx.saved_tensors[0], grad_RD, ctx.counts)
        return grad_RD, None, None, None


def dense_expert(moe: MoELayer, expert: int) -> Expert:
    """A local expert as three matrices, whatever the form it is stored in; detached."""
    return moe.bank.stored(expert).dense()


def layer_groups(sizes: Iterable[tuple[int, int]], limit: int) -> list[list[int]]:
    """Layers in groups whose bytes stay within `limit`, in order; a layer that exceeds it by itself is a group.

    >>> layer_groups([(0, 4), (1, 4), (2, 9), (3, 1)], 8)
    [[0, 1], [2], [3]]
    """
    groups: list[list[int]] = []
    room = 0
    for layer, size in sizes:
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(layer)
        room -= size
    return groups
