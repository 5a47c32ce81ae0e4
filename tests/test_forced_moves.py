"""200 steps of a real run in which all experts are dealt out anew every ten: its losses are those of one rank."""

import random

import pytest
import torch

from moedist.config import Config, config_from_dict
from moedist.coordinator import equal_plan, migrate
from moedist.phases.train import train_step
from moedist.placement import LayerPlan, Plan
from moedist.trainer import build_run
from moedist.world import World
from tests.ranks import run_ranks

RANKS, EXPERTS, LAYERS, STEPS, EVERY = 3, 6, (0, 1), 200, 10
TREE = {"data": {"tokenizer": "byte", "sequence_length": 16, "max_documents": 40},
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": EXPERTS, "top_k": 2, "expert_hidden": 12},
        # a small epsilon lets Adam turn rounding noise into whole steps
        "train": {"batch": 7, "lr": 3e-3, "eval_tokens": 64, "dtype": "float64", "eps": 1e-4}, "router": {"bias_rate": 1e-3},
        "phases": [{"train": STEPS}], "monitor": {"wandb": "disabled"}}


def random_plans(seed: int) -> dict[int, Plan]:
    """Step -> plan: copies with any shares, ranks without experts or without a batch."""
    dice = random.Random(seed)

    def layer() -> LayerPlan:
        able = sorted(dice.sample(range(RANKS), dice.choice((1, 2, 3, 3))))
        owners = tuple(tuple(sorted(dice.sample(able, dice.choice([1, 1, len(able)])))) for _ in range(EXPERTS))
        weights = [[dice.choice((0, 1, 2, 5)) + 0.01 for _ in ranks] for ranks in owners]
        return LayerPlan(owners, tuple(tuple(w / sum(of) for w in of) for of in weights))

    def batch() -> tuple[float, ...]:
        shares = [float(dice.choice((0, 1, 1, 3))) for _ in range(RANKS)]
        return tuple(shares) if sum(shares) else (1.0,) * RANKS

    return {step: Plan(RANKS, tuple((i, layer()) for i in LAYERS), batch()) for step in range(EVERY, STEPS, EVERY)}


def train(world: World, folder: str, cache: str, plans: dict[int, Plan]):
    """Loss and gradient norm of every step; experts moved at every plan; weights and moments of this rank in the end."""
    config: Config = config_from_dict(TREE, [f"folder={folder}", f"data.cache={cache}"])
    run = build_run(config, world, equal_plan(config, world.size))
    seen, moved = [], []
    for step in range(STEPS):
        if step in plans:
            moved.append(migrate(world, run.engine, plans[step]))
            run.plan = plans[step]
        report = train_step(run)
        seen.append((report.sums["loss"] / (7 * 16), report.grad_norm))
    return seen, moved, {name: t.clone() for name, t in run.engine.named_tensors().items()}


@pytest.mark.usefixtures("one_thread")
def test_losses_do_not_notice_that_experts_move(tmp_path, cache):
    plans = random_plans(0)
    assert any(layer.copies for plan in plans.values() for _, layer in plan.layers)
    assert any(not layer.experts_of_rank(r) for plan in plans.values() for _, layer in plan.layers for r in range(RANKS))
    assert any(0 in plan.batch_shares for plan in plans.values())
    staying = run_ranks(1, train, str(tmp_path), str(cache), {})
    moving = run_ranks(RANKS, train, str(tmp_path), str(cache), plans)
    reference = staying[0][0]
    assert len(plans) == 19 and sum(moving[0][1]) > 19 * EXPERTS / 2
    assert reference[-1][0] < reference[0][0] - 0.3  # it learns
    for seen, *_ in moving:
        for i in range(2):
            assert [s[i] for s in seen] == pytest.approx([s[i] for s in reference], rel=1e-9)
    whole, parts = ({name: t for *_, tensors in ranks for name, t in tensors.items()} for ranks in (staying, moving))
    assert whole.keys() == parts.keys() and any(".experts." in name for name in whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
