"""Watching, deciding and compressing over ranks: the same as one process, whatever the placement, copies included."""

import numpy as np
import pytest
import torch

from moedist.config import CompressConfig
from moedist.coordinator.migrate import migrate
from moedist.data import TrainStream
from moedist.engine import replace_experts
from moedist.model import Batch
from moedist.phases.calibrate import Source, layer_groups, watch_bytes, watch_experts
from moedist.phases.shrink import shrink
from tests.coordinator.test_migrate import plan_of
from tests.engine.test_engine import engine_of
from tests.ranks import run_ranks

COUNTS = {1: [4], 2: [3, 1], 4: [2, 0, 1, 1]}
COPIES = {2: plan_of(2, ((0, 1), 1, (0, 1), 0), (1, (0, 1), 0, 1)), 4: plan_of(4, ((0, 2), 3, (1, 2, 3), 0), (3, 3, (0, 1), 1))}
NEEDS = {"hidden_moment", "fisher", "input_moment", "gate_grad_moment"}


def parts_of(world, copies: bool):
    """A tiny trained engine, and the sequences to watch it on: 7 of 6 tokens, at most 3 in a pass."""
    engine = engine_of(world, COUNTS[world.size], eps=1e-3)
    for bank in engine.model.banks.values():
        bank.initialise(seed=3, std=0.4, out_std=0.4)
    if copies and world.size > 1:
        migrate(world, engine, COPIES[world.size])
    tokens = np.random.default_rng(0).integers(0, 20, 60)
    return engine, Source(TrainStream(tokens, 6, 0), 1, 7, 3, torch.float64)


def train(world, engine, n):
    mine = slice(world.rank, None, world.size)
    ids = torch.arange(24).view(4, 6) % 20
    losses = []
    for step in range(n):
        hidden, _ = engine.model(Batch((ids[mine] + step) % 20, torch.zeros_like(ids[mine]), 0))
        loss = hidden.pow(3).sum() / 24
        engine.backward(loss)
        losses.append(engine.step(0.01, loss.detach().double().reshape(1)).sums.item())
    return losses


def sums(world, copies):
    engine, source = parts_of(world, copies)
    found = watch_experts(engine.model, world, source, [0, 1], NEEDS)
    assert all(p.grad is None for bank in engine.model.banks.values() for p in bank.parameters())
    assert {watch_bytes(engine.model, i, NEEDS) > 0 for i in (0, 1)} == {bool(found)} or world.size > 1
    return {key: {name: t.clone() for name, t in c.tensors().items()} for key, c in found.items()}


@pytest.mark.parametrize("ranks, copies", [(2, False), (2, True), (4, False), (4, True)])
def test_sums_equal_one_process(ranks, copies):
    alone = run_ranks(1, sums, False)[0]
    together: dict = {}
    for part in run_ranks(ranks, sums, copies):
        assert not together.keys() & part.keys(), "an expert is watched on its primary alone"
        together.update(part)
    assert together.keys() == alone.keys() == {(i, e) for i in (0, 1) for e in range(4)}
    assert sum(float(c["rows"]) for c in alone.values()) == 2 * 7 * 6 * 2  # layers, sequences, tokens, K
    assert sum(float(c["weight"]) for c in alone.values()) == pytest.approx(2 * 7 * 6)  # a token's weights sum to one
    for key, tensors in alone.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(together[key][name], tensor, rtol=1e-9, atol=1e-12, msg=f"{key} {name}")


def shrunk_and_trained(world, copies, fields):
    """Kept neurons and weights of every expert, the summaries, and the losses of steps before and after."""
    engine, source = parts_of(world, copies)
    losses = train(world, engine, 2)
    shrunk = shrink(engine.model, world, source, CompressConfig(tokens=1, **fields))
    replace_experts(engine, shrunk.compressed)
    weights = {n: t.clone() for n, t in engine.named_tensors().items() if ".experts." in n}
    return losses + train(world, engine, 3), weights, shrunk.summaries


@pytest.mark.parametrize("fields", [
    {"method": "cur", "ratio": 0.5, "options": {"multiple": 1}},
    {"method": "cur", "ratio": 0.5, "options": {"multiple": 2}, "calibration_bytes": 1, "budget": "frequency"},
    {"method": "cur-hybrid", "ratio": 0.5, "options": {"multiple": 1}, "calibration_bytes": 1},
    {"method": "interp", "ratio": 0.4}, {"method": "cur-matrix", "ratio": 0.4, "budget": "uniform"},
    {"method": "prune-random", "bytes": 5000, "options": {"multiple": 1}},
], ids=lambda fields: f"{fields['method']}-{fields.get('budget', 'global')}")
def test_distributed_equals_one_process(fields):
    losses_alone, alone, summaries_alone = run_ranks(1, shrunk_and_trained, False, fields)[0]
    assert 0 < sum(s.bytes for s in summaries_alone) < sum(s.bytes_before for s in summaries_alone)
    for ranks, copies in ((2, True), (4, False), (4, True)):
        together: dict = {}
        for losses, weights, summaries in run_ranks(ranks, shrunk_and_trained, copies, fields):
            assert losses == pytest.approx(losses_alone, rel=1e-6)
            assert [(s.layer, s.expert, s.hidden, s.bytes) for s in summaries] \
                == [(s.layer, s.expert, s.hidden, s.bytes) for s in summaries_alone]
            together.update(weights)
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            if name.startswith("layers."):  # not the moments: Adam's second ones of 1e-12 differ in what is noise
                torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_few_layers_at_a_time_give_the_same():
    fields = {"method": "cur", "ratio": 0.5, "options": {"multiple": 1}}
    whole = run_ranks(2, shrunk_and_trained, True, fields)
    parts = run_ranks(2, shrunk_and_trained, True, {**fields, "calibration_bytes": 1})
    for (losses, weights, _), (others, other_weights, _) in zip(whole, parts):
        assert losses == others
        for name, tensor in weights.items():
            assert torch.equal(tensor, other_weights[name]), name


def rank_bytes(world, limit):
    engine, source = parts_of(world, True)
    shrunk = shrink(engine.model, world, source, CompressConfig(tokens=1, rank_bytes={1: limit}, options={"multiple": 1}))
    replace_experts(engine, shrunk.compressed)
    held = [bank.form_of(e).bytes(8) for bank in engine.model.banks.values() for e in bank.expert_ids]
    before = {e: [s for s in shrunk.summaries if s.expert == e and s.layer == 0][0].bytes_before for e in range(4)}
    return sum(held), len(held) * before[0]


def test_a_rank_with_little_memory_gets_small_experts():
    (held_0, whole_0), (held_1, whole_1) = run_ranks(2, rank_bytes, 10000)
    assert held_1 <= 10000 < whole_1
    assert held_0 > 0.6 * whole_0, "experts that rank 0 alone has are not touched"


def poisoned(world):
    engine, source = parts_of(world, False)
    if world.rank == 1:
        engine.model.banks[1].w_in.data[0, 0] = torch.nan
    try:
        shrink(engine.model, world, source, CompressConfig(tokens=1, ratio=0.5, options={"multiple": 1}))
    except Exception as error:
        return type(error).__name__, str(error)


def test_what_one_rank_finds_wrong_all_ranks_say():
    results = run_ranks(2, poisoned)
    assert results[0] == results[1] and results[0][0] == "CompressError"
    assert "rank 1:" in results[0][1] and "not finite" in results[0][1]


def test_groups_of_layers():
    assert layer_groups([(0, 4), (1, 4), (2, 9), (3, 1)], 8) == [[0, 1], [2], [3]]
    assert layer_groups([(0, 0), (1, 0)], 1) == [[0, 1]]
