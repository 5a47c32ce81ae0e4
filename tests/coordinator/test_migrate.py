"""Experts on the move: placement and copies change between steps, the losses do not."""

import pytest
import torch

from moedist.coordinator.migrate import migrate, rounds_of_moves
from moedist.engine import replace_experts
from moedist.model import Batch
from moedist.placement import LayerPlan, Plan
from tests.engine.test_engine import engine_of
from tests.model.expert_forms import expert_of
from tests.ranks import run_ranks

IDS = torch.arange(24).view(4, 6) % 20
EMPTY = torch.zeros(0, dtype=torch.float64)


def plan_of(size: int, *layers: tuple) -> Plan:
    """A plan for layers 0 and 1; owners are ranks, or tuples of ranks with equal shares."""
    owners = [tuple(o if isinstance(o, tuple) else (o,) for o in layer) for layer in layers]
    return Plan(size, tuple((i, LayerPlan(o, tuple((1 / len(r),) * len(r) for r in o))) for i, o in enumerate(owners)),
                (1.0,) * size)


def losses(world, counts, plans, steps):
    """Losses and norms of `steps` steps; plan i is in force from its step on; and the weights at the end."""
    engine = engine_of(world, counts, eps=1e-3)
    mine = slice(world.rank, None, world.size)
    found, moved = [], []
    for step in range(steps):
        if step in plans:
            moved.append(migrate(world, engine, plans[step]))
        hidden, _ = engine.model(Batch((IDS[mine] + step) % 20, torch.zeros_like(IDS[mine]), 0))
        loss = hidden.pow(3).sum() / 24
        engine.backward(loss)
        norm = engine.step(0.01, loss.detach().double().reshape(1))
        found.append((norm.sums.item(), norm.grad_norm))
    weights = {n: t.clone() for n, t in engine.model.named_state().items()}
    return found, moved, weights


PLANS = {2: plan_of(3, (2, 2, 2, 2), (0, 1, 2, 0)),          # one rank with everything, one with nothing
         4: plan_of(3, ((0, 1), 1, (0, 1, 2), 2), (1, 1, 1, 0)),  # copies
         5: plan_of(3, ((1, 2), 1, (0, 1, 2), 0), ((0, 2), 1, 0, 2)),  # other copies, another primary
         7: plan_of(3, (0, 1, 2, 0), (0, 0, 0, 0))}          # none any more


def test_moving_experts_and_copies_changes_no_loss():
    alone, _, weights = run_ranks(1, losses, [4], {}, 9)[0]
    parts = run_ranks(3, losses, [1, 0, 3], PLANS, 9)
    for found, moved, part in parts:
        assert moved == parts[0][1] and min(moved) > 0
        for (loss, norm), (loss_alone, norm_alone) in zip(found, alone):
            assert loss == pytest.approx(loss_alone, rel=1e-10, abs=1e-12)
            assert norm == pytest.approx(norm_alone, rel=1e-10)
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-9, atol=1e-11)


def mixed_losses(world, counts, plans, steps):
    """As `losses`, with experts of several forms; and the kinds of banks that this rank has had."""
    engine, kinds = engine_of(world, counts, eps=1e-3), set()
    experts = {0: expert_of("interp", 8, 16, 3, seed=1), 1: expert_of("dense", 5, 16, seed=2, before=8),
               2: expert_of("cur two interp", 6, 16, 2, seed=3, before=8)}
    replace_experts(engine, {layer: {e: experts[e] for e in moe.dispatcher.layout.primary_experts if e in experts}
                             for layer, moe in engine.model.moe_layers()})
    mine = slice(world.rank, None, world.size)
    found = []
    for step in range(steps):
        if step in plans:
            assert migrate(world, engine, plans[step]) > 0
        kinds |= {type(bank).__name__ for bank in engine.model.banks.values()}
        engine.backward(engine.model(Batch((IDS[mine] + step) % 20, torch.zeros_like(IDS[mine]), 0))[0].pow(3).sum() / 24)
        found.append(engine.step(0.01, EMPTY).grad_norm)
    tensors = {n: t.clone() for n, t in engine.named_tensors().items()}
    return found, kinds, tensors, {n: t.clone() for n, t in engine.model.named_state().items()}


def test_experts_move_in_any_form_with_their_optimizer_state():
    """Rank 1 has only dense experts, then only factored ones, then none, and so on: its kind of bank changes."""
    alone, _, everything, state = run_ranks(1, mixed_losses, [4], {}, 9)[0]
    plans = {2: plan_of(3, (1, 0, 1, 2), (1, 0, 1, 2)), 4: plan_of(3, ((0, 1), 1, (0, 1, 2), 2), (2, 1, 2, 0)),
             6: plan_of(3, ((1, 2), 1, (0, 1, 2), 0), ((0, 2), 1, 0, 2)), 7: plan_of(3, (0, 1, 2, 0), (0, 0, 0, 0))}
    parts = run_ranks(3, mixed_losses, [1, 1, 2], plans, 9)
    union = {}
    for found, _, tensors, held in parts:
        assert found == pytest.approx(alone, rel=1e-10)
        union |= tensors
        for name, value in {**tensors, **held}.items():
            torch.testing.assert_close(value, (everything | state)[name], rtol=1e-9, atol=1e-11)
    assert union.keys() == everything.keys() and "layers.0.experts.2.w2.kept" in union
    assert "optimizer.exp_avg_sq.layers.1.experts.0.w1.basis" in union and "layers.1.experts.1.neurons" in union
    assert parts[1][1] == {"ExpertBank", "FactoredBank"}


def bits_of_copies(world, plan):
    engine = engine_of(world, [2, 1, 1], torch.float32)
    migrate(world, engine, plan)
    for step in range(4):
        mine = slice(world.rank, None, world.size)
        engine.backward(engine.model(Batch((IDS[mine] + step) % 20, torch.zeros_like(IDS[mine]), 0))[0].pow(3).sum())
        engine.step(0.01, EMPTY)
    return {n: t.clone() for bank in engine.model.banks.values() for n, t in bank.named_weights().items()}


def test_copies_stay_bitwise_equal():
    parts = run_ranks(3, bits_of_copies, plan_of(3, ((0, 1), 1, (0, 1, 2), 2), ((1, 2), 0, 0, (0, 2))))
    shared = 0
    for a in parts:
        for b in parts:
            for name in a.keys() & b.keys():
                assert torch.equal(a[name], b[name]), name
                shared += a is not b
    assert shared > 0


def test_rounds_have_every_pair_of_ranks_once():
    old, new = LayerPlan.single([0, 0, 0, 1, 2]), LayerPlan.single([1, 1, 2, 0, 2])
    rounds = rounds_of_moves(old, new)
    assert rounds == [[(0, 0, 1), (2, 0, 2), (3, 1, 0)], [(1, 0, 1)]]
    assert rounds_of_moves(old, old) == []
