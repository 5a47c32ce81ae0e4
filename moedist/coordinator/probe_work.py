"""What a probe times: experts and the rest of a model at the shapes of a configuration, forward and backward.

Both are timed as a training step times them (`moedist.timing.Meter`): experts by their feed-forwards alone, and dense is
all else that a rank computes, routing and the sorting of rows included. G sequences of S tokens, D width, E experts.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Callable, ContextManager, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moedist.config import Config
from moedist.coordinator.sizes import Sizes
from moedist.dispatch import Dispatcher, Layout, LocalTransport
from moedist.model import ExpertBank, MoELayer, next_token_loss_sum
from moedist.model.feed_forward import FeedForward
from moedist.model.grouped_ffn import ACTIVATIONS
from moedist.model.transformer import Block, rotary_tables
from moedist.placement import LayerPlan, equal_counts
from moedist.routing import build_router
from moedist.world import World

NO_LAYER = -1  # in the meter: the experts of a probe
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Sample:
    """`seconds()` runs so many rows or tokens forward and backward, once, and says how long this rank took."""

    amount: int
    seconds: Callable[[], float]


@dataclass(frozen=True)
class Work:
    """Something to measure.

    Attributes:
        name: for messages.
        share: rows or tokens of one call, where all ranks have as many.
        unit: amounts come in multiples of it.
        unit_bytes: memory that a row or token takes while it is measured, weights included, estimated.
        sample: makes the measurement of an amount.
    """

    name: str
    share: float
    unit: int
    unit_bytes: float
    sample: Callable[[int], Sample]


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of activations."""
    return getattr(torch, config.train.dtype)


def weight_dtype(config: Config) -> torch.dtype:
    return torch.float64 if config.train.dtype == "float64" else torch.float32


def autocast(config: Config, device: torch.device) -> ContextManager:
    """As in training: low precision is for activations."""
    dtype = compute_dtype(config)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator's queue is empty."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def expert_work(config: Config, sizes: Sizes, world: World) -> Work:
    """The experts of one layer. More rows come with more experts, as they do when a plan gives a rank more."""
    m, dtype, device, meter = config.model, compute_dtype(config), world.device, world.meter
    per_expert = max(1.0, sizes.part * sizes.sequence * sizes.rows_per_token / m.experts)
    gate = ACTIVATIONS[m.activation]

    def sample(rows: int) -> Sample:
        experts = max(1, round(rows / per_expert))
        bank = ExpertBank(NO_LAYER, range(experts), m.width, [m.expert_hidden] * experts, m.activation, device,
                          weight_dtype(config))
        for weight in bank.parameters():
            nn.init.normal_(weight, std=WEIGHT_STD)
        counts = equal_counts(rows, experts)
        rows_RD = torch.randn(rows, m.width, device=device, dtype=dtype, requires_grad=True)
        grad_RD = torch.randn_like(rows_RD)
        timed = functools.partial(meter.expert, NO_LAYER)

        def seconds() -> float:
            before = meter.take().expert_s.get(NO_LAYER, 0.0)
            with autocast(config, device):
                y_RD = _call(config, bank, rows_RD, counts, timed)
            y_RD.backward(grad_RD)
            rows_RD.grad = None
            bank.zero_grad()
            return meter.take().expert_s[NO_LAYER] - before

        return Sample(rows, seconds)

    row_bytes = dtype.itemsize * (4 * m.width + (2 * gate + 3) * m.expert_hidden)
    return Work("expert", sizes.part * sizes.sequence * sizes.rows_per_token / world.size, 1,
                row_bytes + 4 * sizes.expert_bytes / per_expert, sample)


def dense_work(config: Config, sizes: Sizes, vocab: int, world: World) -> Work:
    """All of the model but the experts: one block of each kind counts for all of its kind."""
    parts = _dense_parts(config, vocab, world.device)
    throttle = world.meter.throttle

    def sample(tokens: int) -> Sample:
        shape = (tokens // sizes.sequence, sizes.sequence)
        ids_GS = torch.randint(vocab, shape, device=world.device)
        keys_GS = torch.arange(tokens, device=world.device).view(shape)
        x_GSD = torch.randn(*shape, config.model.width, device=world.device, dtype=weight_dtype(config), requires_grad=True)

        def seconds() -> float:
            total = 0.0
            for part in parts:
                synchronize(world.device)
                throttle.catch_up()  # what came before is not the part's
                start = time.perf_counter()
                part.run(x_GSD, ids_GS, keys_GS)
                synchronize(world.device)
                throttle.catch_up()
                total += part.times * (time.perf_counter() - start)
                x_GSD.grad = None
                for module in part.modules:
                    module.zero_grad()
            return total

        return Sample(tokens, seconds)

    return Work("dense", sizes.part * sizes.sequence / world.size, sizes.sequence, sizes.token_bytes, sample)


@dataclass(frozen=True)
class _Part:
    """A part that the model has `times` of; `run(x, ids, keys)` goes forward and backward once."""

    times: int
    modules: Sequence[nn.Module]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def _dense_parts(config: Config, vocab: int, device: torch.device) -> list[_Part]:
    """A MoE block without its experts, a block with a dense feed-forward, and what comes before and after the blocks."""
    m, moe = config.model, len(config.routed_layers())
    parts = []
    if moe:
        router = build_router(m.width, m.experts, m.top_k, config.router, config.data.sequence_length)
        shared = FeedForward(m.width, m.expert_hidden * m.shared_experts, m.activation) if m.shared_experts else None
        here = Layout(LayerPlan.single([0] * m.experts), 0, 1)
        layer = MoELayer(router, _NoExperts(), Dispatcher(here, LocalTransport(), device), shared)
        parts.append(_block_part(config, moe, layer, device))
    if moe < m.layers:
        parts.append(_block_part(config, m.layers - moe, FeedForward(m.width, m.ffn_hidden, m.activation), device))
    return parts + [_ends_part(config, vocab, device)]


class _NoExperts(nn.Module):
    """A bank whose experts return what they get: what is left is the cost of sending rows to experts and back."""

    restores = False

    def forward(self, rows_RD: torch.Tensor, *_: object) -> torch.Tensor:
        return rows_RD


def _block_part(config: Config, times: int, feed_forward: nn.Module, device: torch.device) -> _Part:
    m = config.model
    block = Block(m, feed_forward).to(device=device, dtype=weight_dtype(config))
    for weight in block.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=WEIGHT_STD)

    def run(x_GSD: torch.Tensor, ids_GS: torch.Tensor, keys_GS: torch.Tensor) -> None:
        with autocast(config, device):
            cos, sin = rotary_tables(torch.arange(x_GSD.shape[1], device=device), m.head, m.rope_base, x_GSD.dtype)
            y_GSD, report = _call(config, block, x_GSD, cos, sin, ids_GS, keys_GS, 0)
        aux = list(report.aux_losses.values()) if report else []
        torch.autograd.backward([y_GSD, *aux], [torch.ones_like(y_GSD), *[None] * len(aux)])

    return _Part(times, [block], run)


def _ends_part(config: Config, vocab: int, device: torch.device) -> _Part:
    """Embedding, last norm, output projection and loss."""
    m, dtype = config.model, compute_dtype(config)
    factory = {"device": device, "dtype": weight_dtype(config)}
    rows = m.vocab_rows(vocab)
    embedding, norm = nn.Embedding(rows, m.width, **factory), nn.RMSNorm(m.width, eps=m.norm_eps, **factory)
    head = embedding if m.tie_embeddings else nn.Linear(m.width, rows, bias=False, **factory)
    for module in {embedding, head}:
        nn.init.normal_(module.weight, std=WEIGHT_STD)

    def run(_: torch.Tensor, ids_GS: torch.Tensor, __: torch.Tensor) -> None:
        with autocast(config, device):
            hidden_GSD = norm(embedding(ids_GS))
        next_token_loss_sum(hidden_GSD.flatten(0, 1).to(dtype), head.weight, ids_GS.flatten()).backward()

    return _Part(1, [embedding, norm, head], run)


def _call(config: Config, module: nn.Module, *args: object) -> object:
    """Call a module, with its activations recomputed in the backward pass where the configuration says so."""
    if not config.model.recompute:
        return module(*args)
    with set_checkpoint_early_stop(False):
        return checkpoint(module, *args, use_reentrant=False)
