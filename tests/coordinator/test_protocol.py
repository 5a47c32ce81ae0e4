"""All ranks take the plan, or none does and all know why."""

import json

import pytest

from moedist.coordinator.protocol import agree
from moedist.errors import PlacementError
from moedist.placement import LayerPlan, Plan
from tests.ranks import run_ranks

PLAN = Plan(3, ((0, LayerPlan.single([0, 1, 2, 0])),), (1.0, 2.0, 1.0))


def fail():
    raise PlacementError("8 experts do not fit")


def crash():
    raise ZeroDivisionError("division by zero")


def try_agree(world, case):
    def check(plan):
        return "too large for me" if case == "objection" and world.rank == 2 else None

    def broken_check(plan):
        raise PlacementError("no such rank")

    if case == "garbled" and world.rank == 1:  # this rank reads another text than the others
        read = world.broadcast_object
        world.broadcast_object = lambda value: {**read(value), "sha256": "0" * 64}
    solve = {"fails": fail, "crashes": crash,
             "wrong size": lambda: Plan(2, PLAN.layers[:0], (1.0, 1.0))}.get(case, lambda: PLAN)
    try:
        plan, why = agree(world, solve, broken_check if case == "check fails" and world.rank == 1 else check)
    finally:
        world.__dict__.pop("broadcast_object", None)
    return plan and plan.sha256, why


@pytest.mark.parametrize("case, words", [
    ("objection", ["rank 2: too large for me"]),
    ("fails", ["rank 0 could not plan: 8 experts do not fit"]),
    ("crashes", ["ZeroDivisionError: division by zero"]),
    ("garbled", ["rank 1: reads another plan", "000000000000"]),
    ("wrong size", ["rank 0: the plan is for 2 ranks, the world has 3", "rank 2"]),
    ("check fails", ["rank 1: cannot read the plan: no such rank"]),
])
def test_whatever_fails_no_rank_takes_the_plan(case, words):
    results = run_ranks(3, try_agree, case)
    assert len(set(results)) == 1 and results[0][0] is None
    for word in words:
        assert word in results[0][1]


def test_all_take_the_plan():
    assert run_ranks(3, try_agree, "fine") == [(PLAN.sha256, "")] * 3


def test_canonical_json_is_read_back_to_the_same_hash():
    assert Plan.from_json(PLAN.to_json()).sha256 == PLAN.sha256
    assert json.loads(PLAN.to_json())["world_size"] == 3
