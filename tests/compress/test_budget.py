"""Budgets: never exceeded, used up to the next unit, monotone, deterministic, and right against brute force."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress import MODES, Budget, Curve, allocate
from moedist.compress.budget import full_bytes
from moedist.errors import CompressError
from tests.compress.cases import quick

TOKENS = {key: float(key) for key in range(6)}


def curve(part: str, gains: list[float], cost: int = 4, names: int = 0, step: int = 1) -> Curve:
    units = len(gains)
    gain = torch.tensor(gains, dtype=torch.float64).sort(descending=True).values
    indices = [names * n for n in range(units)] + [0]
    return Curve(part, gain, tuple(cost * n for n in range(units + 1)), tuple(indices), step)


def neurons(*gains: float, **options) -> list[Curve]:
    return [curve("neurons", list(gains), **options)]


@st.composite
def curve_sets(draw, most_units: int = 6, names: int = 1, steps: int = 3, most_experts: int = 4):
    """Curves by expert, as of small experts: several parts, names, multiples, ties and zeros."""
    curves = {}
    for key in range(draw(st.integers(1, most_experts))):
        curves[key] = []
        for part in draw(st.sampled_from([("neurons",), ("gate", "up"), ("gate", "up", "down")])):
            gains = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 10), min_size=1, max_size=most_units))
            curves[key].append(curve(part, gains, draw(st.integers(1, 5)), draw(st.integers(0, names)),
                                     draw(st.integers(1, min(steps, len(gains))))))
    return curves


def used(curves, keep, keys=None) -> int:
    return sum(c.bytes(keep[key][c.part]) for key in (curves if keys is None else keys) for c in curves[key])


def next_sizes(curves, keep, key) -> list[int]:
    """Bytes that the next step of every part of an expert would add."""
    sizes = []
    for c in curves[key]:
        kept = keep[key][c.part]
        if kept < c.units:
            sizes.append(c.bytes(min(c.units, kept + c.step)) - c.bytes(kept))
    return sizes


def least(curves) -> int:
    return used(curves, {key: {c.part: c.step for c in parts} for key, parts in curves.items()})


@given(curve_sets(), st.sampled_from(MODES), st.integers(0, 600))
@quick
def test_never_exceeds_and_falls_short_by_less_than_the_next_unit(curves, mode, limit):
    whole = sum(full_bytes(curves).values())
    try:
        keep = allocate(curves, Budget(bytes=limit), mode, floor=0.0, frequency=TOKENS)
    except CompressError:
        assert min(least(curves), whole) > limit
        return
    assert used(curves, keep) <= limit
    assert all(keep[key][c.part] % c.step == 0 or keep[key][c.part] == c.units for key in curves for c in curves[key])
    sizes = [size for key in curves for size in next_sizes(curves, keep, key)]
    assert not sizes or max(sizes) > limit - used(curves, keep)
    if limit >= whole:
        assert not sizes


@given(curve_sets(), st.sampled_from(MODES), st.integers(0, 600), st.integers(0, 200))
@quick
def test_keeps_no_less_when_the_budget_grows(curves, mode, limit, more):
    try:
        small = allocate(curves, Budget(bytes=limit), mode, floor=0.0, frequency=TOKENS)
    except CompressError:
        return
    large = allocate(curves, Budget(bytes=limit + more), mode, floor=0.0, frequency=TOKENS)
    assert all(large[key][part] >= kept for key, parts in small.items() for part, kept in parts.items())


@given(curve_sets(), st.sampled_from(MODES), st.lists(st.integers(20, 300), min_size=3, max_size=3),
       st.sampled_from([None, 0.2, 0.5]), st.data())
@quick
def test_every_owner_is_within_its_bytes(curves, mode, sizes, ratio, data):
    owners = {key: data.draw(st.sets(st.integers(0, 3), min_size=1, max_size=3)) for key in curves}
    owner_bytes = dict(enumerate(sizes))  # owner 3 has no limit
    budget = Budget(ratio=ratio, owner_bytes=owner_bytes, owners=owners)
    on = {rank: [key for key in curves if rank in owners[key]] for rank in owner_bytes}
    try:
        keep = allocate(curves, budget, mode, floor=0.0, frequency=TOKENS)
    except CompressError:
        return
    slack = {rank: limit - used(curves, keep, on[rank]) for rank, limit in owner_bytes.items()}
    if ratio is not None:
        slack[None], on[None] = int((1 - ratio) * sum(full_bytes(curves).values()) + 1e-6) - used(curves, keep), list(curves)
    assert all(free >= 0 for free in slack.values())
    for key in curves:
        if next_sizes(curves, keep, key):  # not whole: one of its owners had no room for a next unit
            assert any(max((size for other in on[rank] for size in next_sizes(curves, keep, other)), default=0) > slack[rank]
                       for rank in slack if key in on[rank])


@given(curve_sets(most_units=4, names=0, steps=1, most_experts=2), st.integers(0, 200))
@quick
def test_the_global_ranking_is_the_best_of_its_bytes(curves, limit):
    """Gains fall and all units of a part cost the same: no other choice of as many bytes is worth more."""
    try:
        keep = allocate(curves, Budget(bytes=limit), floor=0.0)
    except CompressError:
        return
    parts = [(key, c) for key in curves for c in curves[key]]

    def worth(kept):
        return sum(float(c.gain[:n].sum()) for (_, c), n in zip(parts, kept))

    ours = [keep[key][c.part] for key, c in parts]
    size = used(curves, keep)
    best = max(worth(kept) for kept in product(*(range(1, c.units + 1) for _, c in parts))
               if sum(c.bytes(n) for (_, c), n in zip(parts, kept)) <= size)
    assert worth(ours) == pytest.approx(best, abs=1e-9)


@given(curve_sets(), st.sampled_from(MODES), st.floats(0, 0.9), st.randoms(use_true_random=False))
@quick
def test_the_order_of_experts_does_not_matter(curves, mode, ratio, random):
    keys = list(curves)
    random.shuffle(keys)
    try:
        keep = allocate(curves, Budget(ratio=ratio), mode, floor=0.0, frequency=TOKENS)
    except CompressError:
        return
    assert allocate({key: curves[key] for key in keys}, Budget(ratio=ratio), mode, floor=0.0, frequency=TOKENS) == keep


def test_global_takes_the_best_units_wherever_they_are():
    curves = {0: neurons(9, 8, 1, 1), 1: neurons(7, 2, 2, 2), 2: neurons(6, 5, 4, 3)}
    keep = allocate(curves, Budget(bytes=7 * 16))
    assert keep == {0: {"neurons": 2}, 1: {"neurons": 1}, 2: {"neurons": 4}}


def test_global_weighs_gains_by_what_they_cost():
    curves = {0: neurons(9, 8, 7, cost=30), 1: neurons(5, 4, 3, cost=10)}
    assert allocate(curves, Budget(bytes=4 * 70))[1] == {"neurons": 3}
    assert allocate(curves, Budget(bytes=4 * 120)) == {0: {"neurons": 3}, 1: {"neurons": 3}}


def test_cheap_late_units_count_by_their_average():
    """A factorisation that would take as much as the matrix is stored dense: the ranks that follow cost nothing."""
    plateau = Curve("up", torch.tensor([5.0, 0.5, 0.4, 0.3]).double(), (0, 10, 20, 20, 20), (0,) * 5)
    other = curve("up", [5.0, 1.0, 0.9, 0.8], cost=10)
    assert allocate({0: [plateau], 1: [other]}, Budget(bytes=4 * 30)) == {0: {"up": 4}, 1: {"up": 1}}
    weak = Curve("up", torch.tensor([5.0, 0.3, 0.2, 0.1]).double(), (0, 10, 20, 20, 20), (0,) * 5)
    assert allocate({0: [weak], 1: [other]}, Budget(bytes=4 * 30)) == {0: {"up": 1}, 1: {"up": 2}}


def test_equal_worth_is_shared_evenly():
    curves = {key: neurons(*[1.0] * units) for key, units in enumerate((8, 8, 16))}
    assert allocate(curves, Budget(ratio=0.5)) == {0: {"neurons": 4}, 1: {"neurons": 4}, 2: {"neurons": 8}}


def test_uniform_keeps_the_same_share_whatever_the_worth():
    curves = {0: neurons(*range(90, 100)), 1: neurons(*[0.1] * 20), 2: [curve(p, [1.0] * 10) for p in ("gate", "up")]}
    assert allocate(curves, Budget(ratio=0.5), "uniform") == {0: {"neurons": 5}, 1: {"neurons": 10},
                                                            2: {"gate": 5, "up": 5}}


def test_frequency_keeps_in_proportion_to_tokens_or_all():
    curves = {key: neurons(*[1.0] * 100) for key in range(4)}
    tokens = {0: 10, 1: 20, 2: 40, 3: 0}
    keep = allocate(curves, Budget(bytes=16 * 142), "frequency", frequency=tokens)
    assert keep == {0: {"neurons": 20}, 1: {"neurons": 40}, 2: {"neurons": 80}, 3: {"neurons": 2}}
    keep = allocate(curves, Budget(bytes=16 * 180), "frequency", frequency=tokens)
    assert [keep[key]["neurons"] for key in tokens] == [26, 52, 100, 2]
    with pytest.raises(CompressError, match="needs the routed tokens of all 4 experts; 2 have none given"):
        allocate(curves, Budget(ratio=0.5), "frequency", frequency={0: 1, 1: 2})


def test_floors_and_steps():
    curves = {0: neurons(*[1.0] * 100), 1: neurons(*[0.0] * 100, step=8), 2: neurons(1.0, 1.0, step=2)}
    keep = allocate(curves, Budget(bytes=16 * 80), floor=0.05)
    assert keep == {0: {"neurons": 70}, 1: {"neurons": 8}, 2: {"neurons": 2}}
    assert allocate(curves, Budget(bytes=16 * 80), floor=0.1)[1] == {"neurons": 16}
    odd = {0: neurons(*[1.0] * 13, step=8)}
    assert allocate(odd, Budget(bytes=16 * 12)) == {0: {"neurons": 8}}
    assert allocate(odd, Budget(bytes=16 * 13)) == {0: {"neurons": 13}}


def test_memory_of_a_small_rank():
    """The rank with little memory gets small experts; the others keep all of theirs."""
    curves = {key: neurons(*[1.0] * 10) for key in range(4)}
    owners = {0: [0], 1: [0], 2: [1], 3: [1]}
    keep = allocate(curves, Budget(owner_bytes={0: 16 * 9}, owners=owners))
    assert [keep[key]["neurons"] for key in range(4)] == [5, 4, 10, 10]
    copied = allocate(curves, Budget(owner_bytes={0: 16 * 9}, owners={**owners, 2: [1, 0]}))
    assert [copied[key]["neurons"] for key in range(4)] == [3, 3, 3, 10]
    both = allocate(curves, Budget(ratio=0.5, owner_bytes={0: 16 * 6}, owners=owners))
    assert [both[key]["neurons"] for key in range(4)] == [3, 3, 7, 7]


def test_names_and_item_sizes_count():
    curves = {0: neurons(*[1.0] * 10, cost=4, names=1)}
    assert allocate(curves, Budget(bytes=100))[0] == {"neurons": 5}  # 20 bytes each
    assert allocate(curves, Budget(bytes=100), itemsize=2)[0] == {"neurons": 10}  # 8 bytes each and no names
    assert allocate(curves, Budget(bytes=79), itemsize=2)[0] == {"neurons": 6}  # 12 bytes each


def test_nothing_to_remove_and_nothing_at_all():
    curves = {0: neurons(*[0.0] * 7, step=3, names=1)}
    for mode in MODES:
        assert allocate(curves, Budget(ratio=0.0), mode, frequency=TOKENS) == {0: {"neurons": 7}}
        assert allocate({}, Budget(ratio=0.5), mode) == {}


def test_part_of_the_way():
    curves = {0: neurons(*[1.0] * 100)}
    for share in (0.0, 0.25, 0.5, 1.0):
        assert allocate(curves, Budget(ratio=0.8), share=share)[0]["neurons"] == round(100 - 80 * share)
    roomy = Budget(owner_bytes={0: 10**6}, owners={0: [0]})
    assert roomy.limits({0: 1600}, 0.5) == {0: 10**6}


@pytest.mark.parametrize("options, words", [
    ({}, "needs a ratio, bytes, or bytes per owner"),
    ({"ratio": 0.5, "bytes": 3}, "can't provide both a ratio and bytes"),
    ({"ratio": 1.0}, "ratio is 1: the share to remove"),
    ({"ratio": -0.1}, "ratio is -0.1"),
    ({"ratio": float("nan")}, "ratio is nan"),
    ({"owner_bytes": {0: 3}}, "need to know the owners"),
])
def test_impossible_budgets(options, words):
    with pytest.raises(CompressError, match=words):
        Budget(**options)


def test_floors_above_the_budget_are_refused_with_numbers():
    curves = {key: neurons(*[1.0] * 16, step=8) for key in range(2)}
    with pytest.raises(CompressError, match=r"all experts may take 128 bytes, .* \(floor 0.02, whole steps\) takes 256"):
        allocate(curves, Budget(ratio=0.75))
    with pytest.raises(CompressError, match="the experts of owner 3 may take 100 bytes"):
        allocate(curves, Budget(owner_bytes={3: 100}, owners={0: [3], 1: [0]}))
    with pytest.raises(CompressError, match="mode is 'even'; it must be one of global, uniform, frequency"):
        allocate(curves, Budget(ratio=0.5), "even")
