"""Schedules, the global norm over ranks, and loss scaling."""

import math

import pytest
import torch

from moedist.config import TrainConfig, config_from_dict
from moedist.dispatch import build_transport
from moedist.engine import TorchEngine, learning_rate
from moedist.model import Batch, Transformer
from moedist.placement import plan_from_config
from moedist.world import World
from tests.ranks import run_ranks

TINY = {"model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_hidden": 8},
        "data": {"sequence_length": 6}}


def test_schedules_by_hand():
    config = TrainConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.1, schedule="linear")
    rates = [learning_rate(config, s, 12) for s in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[2] - rates[3] == pytest.approx(rates[8] - rates[9]) == pytest.approx(0.1)
    cosine = [learning_rate(TrainConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.0), s, 11) for s in range(11)]
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.5) and cosine[10] == pytest.approx(0)
    assert cosine[3] == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))
    constant = TrainConfig(lr=0.3, warmup_steps=1, schedule="constant")
    assert [learning_rate(constant, s, 5) for s in range(5)] == [0.3] * 5
    assert learning_rate(TrainConfig(lr=1.0, warmup_steps=50), 9, 10) == pytest.approx(0.2)  # shorter than the warm-up


def engine_of(world: World, counts, weights=torch.float64, **train) -> TorchEngine:
    config = config_from_dict({**TINY, "train": train, "placement": {"counts": counts}})
    plan = plan_from_config(config, world.size)
    model = Transformer(config, 20, plan, build_transport(world), torch.device("cpu"), weights)
    return TorchEngine(model, config.train, world)


def steps(world: World, counts, clip, n=3):
    """Norms of n clipped steps and the weights after them; rank r has sequences r, r + W, ... of four."""
    engine = engine_of(world, counts, clip=clip, eps=1e-3)
    ids = torch.arange(24).view(4, 6) % 20
    mine = slice(world.rank, None, world.size)
    norms = []
    for step in range(n):
        hidden, _ = engine.model(Batch(ids[mine], torch.zeros_like(ids[mine]), 0))
        engine.backward(hidden.pow(3).sum() / 24)
        result = engine.step(0.1, torch.tensor([1.0 + world.rank], dtype=torch.float64))
        assert result.sums.item() == sum(range(1, world.size + 1)) and not result.skipped
        norms.append(result.grad_norm)
    return norms, {n: t.clone() for n, t in engine.model.named_state().items()}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_clipped_steps_equal_one_process(clip):
    norms, weights = run_ranks(1, steps, [4], clip)[0]
    union = {}
    for part_norms, part in run_ranks(3, steps, [1, 0, 3], clip):
        assert part_norms == pytest.approx(norms, rel=1e-10)
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-9, atol=1e-10)
        union |= part
    assert union.keys() == weights.keys() and norms[0] > 1e-3


def test_experts_may_have_a_learning_rate_of_their_own():
    """One plain step, of a tenth of the size for experts."""
    ids, changes = torch.arange(12).view(2, 6), []
    for ratio in (1.0, 0.1):
        engine = engine_of(World(), [4], optimizer="sgd", clip=0, expert_lr_ratio=ratio)
        before = {name: t.clone() for name, t in engine.model.named_state().items()}
        engine.backward(engine.model(Batch(ids, ids, 0))[0].pow(3).sum())
        engine.step(0.1, torch.zeros(1, dtype=torch.float64))
        changes.append({name: t - before[name] for name, t in engine.model.named_state().items()})
    whole, part = changes
    for name, change in whole.items():
        torch.testing.assert_close(part[name], change * (0.1 if ".experts." in name else 1.0), rtol=1e-9, atol=1e-12)
    assert any(change.any() for name, change in whole.items() if ".experts." in name)


def test_norm_is_over_dense_and_expert_gradients():
    engine = engine_of(World(), [4])
    ids = torch.arange(12).view(2, 6)
    engine.backward(engine.model(Batch(ids, ids, 0))[0].pow(3).sum())
    grads = [p.grad for p in [*engine.dense.values(), *engine.experts.parameters()] if p.grad is not None]
    expected = torch.cat([g.flatten() for g in grads]).norm().item()
    assert engine.step(0.0, torch.zeros(0, dtype=torch.float64)).grad_norm == pytest.approx(expected, rel=1e-12)


def test_weight_decay_is_for_matrices_only():
    engine = engine_of(World(), [4], weight_decay=0.5)
    before = {n: t.clone() for n, t in engine.model.named_state().items()}
    engine.step(0.1, torch.zeros(0, dtype=torch.float64))  # no gradients at all: only decay moves weights
    for name, tensor in engine.model.named_state().items():
        factor = 0.95 if tensor.dim() > 1 and "bias" not in name else 1.0
        torch.testing.assert_close(tensor, before[name] * factor)


def test_float16_overflow_skips_the_step_and_halves_the_scale():
    engine = TorchEngine(engine_of(World(), [4], torch.float32).model, TrainConfig(dtype="float16"), World())
    before = {n: t.clone() for n, t in engine.model.named_state().items()}
    scale = engine.scale
    next(iter(engine.dense.values())).grad = torch.full_like(next(iter(engine.dense.values())), math.inf)
    result = engine.step(0.1, torch.zeros(0, dtype=torch.float64))
    assert result.skipped and engine.scale == scale / 2
    assert all(torch.equal(t, before[n]) for n, t in engine.model.named_state().items())
    ids = torch.arange(12).view(2, 6)
    engine.backward(engine.model(Batch(ids, ids, 0))[0].pow(3).sum())
    plain = engine_of(World(), [4], torch.float32)
    plain.backward(plain.model(Batch(ids, ids, 0))[0].pow(3).sum())
    expected = plain.step(0.0, torch.zeros(0, dtype=torch.float64)).grad_norm
    assert engine.step(0.0, torch.zeros(0, dtype=torch.float64)).grad_norm == pytest.approx(expected, rel=1e-4)


def test_sgd_by_hand():
    """No state; weight decay of matrices alone, for dense and expert weights alike."""
    engine = engine_of(World(), [4], optimizer="sgd", weight_decay=0.5, clip=0.0)
    before = {n: t.clone() for n, t in engine.named_tensors().items()}
    assert not any(name.startswith("optimizer.") for name in before)
    ids = torch.arange(12).view(2, 6)
    engine.backward(engine.model(Batch(ids, ids, 0))[0].pow(3).sum())
    grads = {n: p.grad.clone() for n, p in engine.dense.items()}
    for bank in engine.model.banks.values():
        grads |= {n: t.clone() for n, t in bank.split_by_name(tuple(p.grad for p in bank.parameters())).items()}
    engine.step(0.1, torch.zeros(0, dtype=torch.float64))
    for name, tensor in engine.named_tensors().items():
        if name in grads:
            decay = 0.5 * before[name] if tensor.dim() > 1 else 0.0
            torch.testing.assert_close(tensor, before[name] - 0.1 * (grads[name] + decay))
    assert engine.counters()["updates"] == 1
