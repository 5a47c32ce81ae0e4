"""Rows that are restored at the experts their router trusts most: the flag travels with its row, whichever way that goes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moedist.dispatch import Sharing
from moedist.routing import RouterInput
from tests.moe_cases import Case, build_layer
from tests.ranks import run_ranks

OWNERS, EXPERTS = ((0, 1), 1, (0, 2, 3), 3, 3, 0, 2, 1, (1, 3)), 9
ISLANDS = [(), (0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 1, 2)]


@torch.no_grad()
def outputs(world, case: Case, restored, dtype=torch.float64) -> torch.Tensor:
    """What the layer gives this rank's part of the batch."""
    layer, _ = build_layer(world, case, dtype=dtype)
    layer.restored = restored
    first = sum(case.sequences[:world.rank])
    mine = slice(first, first + case.sequences[world.rank])
    total = sum(case.sequences)
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(total, case.sequence, case.width, generator=generator, dtype=torch.float64)[mine].to(dtype)
    ids = torch.randint(0, 50, (total, case.sequence), generator=generator)[mine]
    keys = torch.arange(total * case.sequence).view(total, case.sequence)[mine]
    return layer(RouterInput(x, ids, keys, case.seed, False))[0]


def case_of(owners, sequences, **more) -> Case:
    return Case(owners, sequences, kinds=("low2",) * len(owners), widths=(6,) * len(owners), training=False, **more)


def check(case: Case, restored) -> torch.Tensor:
    alone = run_ranks(1, outputs, case.alone(), restored)[0]
    parts = run_ranks(len(case.sequences), outputs, case, restored)
    torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-10, atol=1e-10)
    return alone


MODES = [(False, 1), (True, 1), (True, 3)]  # overlap, pieces


@pytest.mark.parametrize("dedup", ["none", "rank", "island"])
@pytest.mark.parametrize("islands", ISLANDS, ids=str)
def test_equals_one_process(islands, dedup):
    """Four ranks, one without sequences; experts with copies."""
    i = ISLANDS.index(islands) + ["none", "rank", "island"].index(dedup)
    sharing = Sharing(dedup, (None, None), *MODES[i % 3])
    check(case_of(OWNERS, (2, 0, 3, 1), top_k=3, sequence=4, islands=islands, sharing=sharing, seed=i), 1 + i % 2)


def test_at_none_some_and_all_of_a_tokens_experts():
    case = case_of(OWNERS, (2, 1), top_k=3, sequence=4).alone()
    found = [run_ranks(1, outputs, case, n)[0] for n in (0, 1, 2, 3, None)]
    for less, more in zip(found[:3], found[1:]):
        assert (less - more).abs().max() > 1e-3, "one more restored expert is seen"
    assert torch.equal(found[3], found[4]), "all that a token has are all"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_plain_dispatch_and_experts_in_every_island(ranks):
    owners = tuple(e % ranks for e in range(6))
    check(case_of(owners, (2,) * ranks, top_k=2), 1)
    if ranks == 4:
        everywhere = tuple((e % 2, 2 + e % 2) for e in range(6))
        check(case_of(everywhere, (2, 1, 0, 3), top_k=2, islands=(0, 0, 1, 1), apart=True), 1)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_router_and_placement_equals_one_process(data):
    ranks = data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(1, 7))
    owners = tuple(data.draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts)))
    sequences = tuple(data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks)))
    islands = data.draw(st.sampled_from({2: [(0, 1), ()], 4: ISLANDS}.get(ranks, [()])))
    sharing = Sharing(data.draw(st.sampled_from(["none", "rank", "island"])), (None, None), data.draw(st.booleans()))
    router = data.draw(st.sampled_from(["topk", "expert_choice", "soft_moe", "hash", "switch"]))
    case = case_of(owners, sequences, router=router, top_k=1 if router == "switch" else min(2, experts), islands=islands,
                   sharing=sharing, capacity_factor=data.draw(st.sampled_from([None, 1.0])))
    check(case, data.draw(st.integers(0, 2)))


def test_low_precision_carries_flags_exactly():
    case = case_of((0, 1, 1, 0), (2, 1), top_k=2)
    parts = run_ranks(2, outputs, case, 1, torch.bfloat16)
    alone = run_ranks(1, outputs, case.alone(), 1, torch.bfloat16)[0]
    torch.testing.assert_close(torch.cat(parts), alone, rtol=2e-2, atol=2e-2)
