"""Experts take other forms between two steps: weights, moments, copies and what comes after."""

import pytest
import torch

from moedist.compress import Compressed, Dense, Expert
from moedist.coordinator.migrate import migrate
from moedist.engine import replace_experts
from moedist.engine.expert_optimizer import MOMENTS
from moedist.model import Batch, ExpertBank, FactoredBank
from moedist.model.forms import named
from moedist.placement import LayerPlan, Plan
from moedist.world import World
from tests.engine.test_engine import engine_of
from tests.model.expert_forms import expert_of
from tests.ranks import run_ranks

IDS = torch.arange(24).view(4, 6) % 20
EMPTY = torch.zeros(0, dtype=torch.float64)
RATE, DECAY, EPS, BETAS = 0.01, 0.1, 1e-3, (0.9, 0.95)


def engine(world, counts=(4,)):
    return engine_of(world, list(counts), eps=EPS, weight_decay=DECAY, clip=0.0, beta1=BETAS[0], beta2=BETAS[1])


def backward(world, engine, step):
    mine = slice(world.rank, None, world.size)
    engine.backward(engine.model(Batch((IDS[mine] + step) % 20, torch.zeros_like(IDS[mine]), 0))[0].pow(3).sum() / 24)


def train(world, engine, steps, first=0):
    for step in range(first, first + steps):
        backward(world, engine, step)
        engine.step(RATE, EMPTY)


def narrowed(bank, e, kept):
    """Joint selection: whole neurons of a dense expert."""
    before, neurons = bank.stored(e), torch.tensor(kept)
    parts = Expert.of({part: m.dense() for part, m in before.parts.items()}).select(neurons).parts
    return Compressed(bank.form_of(e).hidden, neurons.int(), {part: Dense(m.clone()) for part, m in parts.items()})


def smaller(bank, e):
    """One expert of each kind; expert 3 is left alone."""
    if e == 0:
        return narrowed(bank, e, [1, 2, 6])
    return expert_of({1: "interp", 2: "two dense cur"}[e], 8, 16, 2, seed=e)


def compress(engine, kinds=(0, 1, 2)):
    replace_experts(engine, {layer: {e: smaller(moe.bank, e) for e in kinds if e in moe.dispatcher.layout.primary_experts}
                             for layer, moe in engine.model.moe_layers()})


def test_widths_change_and_moments_are_indexed():
    one = engine(World())
    train(World(), one, 3)
    before = {name: t.clone() for name, t in one.named_tensors().items()}
    compress(one, kinds=(0,))
    bank, after = one.model.banks[1], one.named_tensors()
    assert isinstance(bank, ExpertBank) and bank.widths == [3, 8, 8, 8] and one.counters()["updates"] == 3
    for prefix in ("", *(f"optimizer.{moment}." for moment in MOMENTS)):
        for w in ("w1", "w2", "w3"):
            kept, whole = (f"{prefix}layers.1.experts.{e}.{w}" for e in (0, 3))
            assert torch.equal(after[kept], before[kept][[1, 2, 6]]) and torch.equal(after[whole], before[whole])
            assert after[kept].any()
    assert after["layers.1.experts.0.neurons"].tolist() == [1, 2, 6]


def test_the_next_step_is_adamw_by_hand():
    world = World()
    one = engine(world)
    train(world, one, 3)
    old = {name: t.clone() for name, t in one.named_tensors().items()}
    compress(one)
    bank, state = one.model.banks[0], {name: t.clone() for name, t in one.named_tensors().items()}
    assert isinstance(bank, FactoredBank)
    new = bank.stored(1)
    for i, moment in enumerate(MOMENTS):
        parts = [old[f"optimizer.{moment}.layers.0.experts.1.{w}"] for w in ("w1", "w3", "w2")]
        for name, value in named(new, new.map_moments(*parts, second=bool(i))).items():
            torch.testing.assert_close(state[f"optimizer.{moment}.layers.0.experts.1.{name}"], value, rtol=1e-12, atol=1e-14)
    backward(world, one, 3)
    grads = bank.split_by_name(tuple(p.grad.clone() for p in bank.parameters()))
    one.step(RATE, EMPTY)
    for name, weight in bank.named_weights().items():
        m, v = (state[f"optimizer.{moment}.{name}"] for moment in MOMENTS)
        m = BETAS[0] * m + (1 - BETAS[0]) * grads[name]
        v = BETAS[1] * v + (1 - BETAS[1]) * grads[name].square()
        step = (m / (1 - BETAS[0] ** 4)) / ((v / (1 - BETAS[1] ** 4)).sqrt() + EPS)
        torch.testing.assert_close(weight, state[name] * (1 - RATE * DECAY) - RATE * step, rtol=1e-10, atol=1e-12)


def test_names_of_neurons_go_back_to_before_the_first_compression():
    one = engine(World())
    compress(one, kinds=(0,))
    replace_experts(one, {0: {0: narrowed(one.model.banks[0], 0, [0, 2])}})
    assert one.model.banks[0].stored(0).neurons.tolist() == [1, 6]
    replace_experts(one, {0: {0: expert_of("interp", 2, 16, 1)}})  # all neurons kept
    stored = one.model.banks[0].stored(0, hidden=8)
    assert stored.neurons.tolist() == [1, 6] and stored.padded().hidden == 8
    assert one.model.banks[1].stored(0).neurons.tolist() == [1, 2, 6]


def test_a_factored_expert_is_compressed_again():
    one = engine(World())
    train(World(), one, 2)
    compress(one)
    train(World(), one, 2, first=2)
    replace_experts(one, {layer: {e: narrowed(bank, e, [0, 3, 4, 5, 7]) for e in (1, 2)}
                          for layer, bank in one.model.banks.items()})
    assert isinstance(one.model.banks[0], ExpertBank) and one.model.banks[0].widths == [3, 5, 5, 8]
    tensors = one.named_tensors()
    for e in (1, 2):
        assert all(tensors[f"optimizer.{m}.layers.0.experts.{e}.w1"].any() for m in MOMENTS)
        assert (tensors[f"optimizer.exp_avg_sq.layers.0.experts.{e}.w2"] >= 0).all()
    train(World(), one, 2, first=4)


def losses(world, counts, plan=None):
    """Losses before and after compression, then the names and values of all that this rank holds."""
    one, found = engine(world, counts), []
    if plan is not None:
        migrate(world, one, plan)
    for step in range(8):
        if step == 3:
            compress(one)
        backward(world, one, step)
        found.append(one.step(RATE, EMPTY).grad_norm)
    held = {name: t.clone() for bank in one.model.banks.values()
            for name, t in (bank.named_weights() | bank.named_indices()).items()}
    return found, held, [type(bank).__name__ for bank in one.model.banks.values()]


COPIES = Plan(3, tuple((i, LayerPlan(owners, tuple((1 / len(o),) * len(o) for o in owners))) for i, owners in
                       enumerate([((0, 1), (0, 2), (1,), (0,)), ((1,), (0, 1, 2), (1, 2), (0,))])), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("counts, plan", [([1, 0, 3], None), ([2, 1, 1], COPIES)])
def test_any_number_of_ranks_equals_one(counts, plan):
    alone, held, _ = run_ranks(1, losses, [4])[0]
    parts, seen = run_ranks(3, losses, counts, plan), {}
    for found, part, _ in parts:
        assert found == pytest.approx(alone, rel=1e-9)
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, held[name], rtol=1e-8, atol=1e-10)
            assert name not in seen or torch.equal(tensor, seen[name]), f"copies of {name} differ"
            seen[name] = tensor
    assert seen.keys() == held.keys()
    if plan is None:
        assert [kinds for *_, kinds in parts] == [["ExpertBank"] * 2, ["ExpertBank"] * 2, ["FactoredBank"] * 2]


def strangers(world):
    one = engine(world, [1, 3])
    with pytest.raises(ValueError, match=r"experts \[.\] of layer 0 are updated by other ranks"):
        replace_experts(one, {0: {3 * (1 - world.rank): expert_of("dense", 8, 16)}})


def test_strangers_and_other_widths_are_refused():
    run_ranks(2, strangers)
    with pytest.raises(ValueError, match="expert 0 of layer 0 has 8 neurons, and was compressed from 9"):
        replace_experts(engine(World()), {0: {0: expert_of("dense", 5, 16, before=9)}})
