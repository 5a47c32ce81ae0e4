"""Low-bit experts with compensators: exact budgets, optimal factors, honest errors, refusals."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress import Calibration, build_beam, build_method
from moedist.compress.beam import Beam, Lowered, Offer, facts, kurtosis, lower, measured_loss, offer, relative_error, restore
from moedist.compress.beam_budget import decide_bits, decide_ranks
from moedist.compress.choose import choose
from moedist.compress.compensate import compensate, compensator_bytes, factor_scheme
from moedist.compress.lowbit import LowBit, in_order
from moedist.compress.quantise import Scheme, round_to_nearest
from moedist.compress.weighting import Weighting
from moedist.errors import CompressError
from tests.compress.cases import calibrated, make_expert, normal, positive, quick, seeds, tokens_of

BEAM = Beam(bits=2, group=8)


@st.composite
def problems(draw):
    """Costs, sizes and a budget, few enough to try everything."""
    items = draw(st.integers(0, 4))
    numbers = st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3))
    counts = [draw(st.integers(1, 4)) for _ in range(items)]
    costs = [[draw(numbers) for _ in range(n)] for n in counts]
    sizes = [[draw(st.integers(0, 30)) * draw(st.sampled_from([1, 1000])) for _ in range(n)] for n in counts]
    return costs, sizes, draw(st.integers(0, 60)) * draw(st.sampled_from([1, 1000]))


@quick
@given(problems())
def test_choices_cost_no_more_than_the_best_of_all(problem):
    costs, sizes, budget = problem
    fits = [js for js in product(*(range(len(c)) for c in costs)) if sum(s[j] for s, j in zip(sizes, js)) <= budget]
    if not fits:
        with pytest.raises(CompressError, match=f"take at least {sum(map(min, sizes))} bytes, and may take {budget}"):
            choose(costs, sizes, budget)
        return
    found = choose(costs, sizes, budget)
    assert sum(s[j] for s, j in zip(sizes, found)) <= budget
    best = min(sum(c[j] for c, j in zip(costs, js)) for js in fits)
    assert sum(c[j] for c, j in zip(costs, found)) == pytest.approx(best, abs=1e-6)


@quick
@given(st.integers(2, 10), st.integers(2, 10), st.data(), seeds)
def test_factors_are_the_best_of_their_rank_in_the_norm(m, n, data, seed):
    """Before rounding: nothing else of that rank is nearer; in 8 bits they lose little of it."""
    rank = data.draw(st.integers(1, min(m, n)))
    residual = normal(m, n, seed=seed)
    left, right = (torch.linalg.cholesky(positive(k, seed % 99)) for k in (m, n))
    norm = Weighting(left, right, 1.0)
    weighted = torch.linalg.svdvals(left.t() @ residual @ right)
    least = float(weighted[rank:].square().sum())
    whole = float(weighted.square().sum())
    found = compensate(residual, rank, norm, factor_scheme(8, 64))
    error = float(norm.apply(residual - found.dense(torch.float64)).square().sum())
    assert least - 1e-9 * whole <= error <= least + 2e-3 * whole
    assert found.rank == rank and found.bytes == compensator_bytes(m, n, rank, factor_scheme(8, 64))


def test_coarser_factors_lose_more_but_still_help():
    residual, norm = normal(32, 24), Weighting(None, None, 1.0)
    errors = [float((residual - compensate(residual, 8, norm, factor_scheme(bits, 16)).dense(torch.float64)).square().sum())
              for bits in (8, 4)]
    assert errors[0] < errors[1] < float(residual.square().sum())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_expert_goes_through_its_stored_tensors(gated, bits):
    expert = make_expert(hidden=20, gated=gated)  # no multiple of the group: the last is shorter
    calibration = calibrated(expert)
    beam = replace(BEAM, bits=bits)
    new = restore(expert, calibration, beam, lower(expert, calibration, beam, bits), dict.fromkeys(expert.parts, 3))
    assert new.bytes == sum(t.nbytes for matrix in new.parts.values() for t in matrix.tensors().values())
    for part, matrix in new.parts.items():
        tensors = matrix.tensors()
        assert in_order(reversed(list(tensors))) == list(tensors)
        again = LowBit.of(tensors, expert.hidden, expert.width, matrix.transposed)
        assert torch.equal(again.dense(), matrix.dense()) and matrix.dense().shape == expert.up.shape
        with pytest.raises(CompressError, match="not trained"):
            matrix.map_moments(expert.up, False)


def test_more_bits_and_more_rank_bring_it_nearer():
    expert = make_expert(hidden=32, width=16)
    calibration, x = calibrated(expert), tokens_of(expert)[0]
    errors = []
    for bits, rank in ((2, 0), (2, 4), (2, 8), (3, 8), (4, 8), (8, 8)):
        parts = lower(expert, calibration, BEAM, bits)
        new = restore(expert, calibration, BEAM, parts, dict.fromkeys(parts, rank))
        stated = relative_error(expert, calibration, BEAM, new.parts), measured_loss(expert, calibration, BEAM, new.parts)
        seen = float((new.dense()(x.float()) - expert(x)).square().sum() / expert(x).square().sum()) ** 0.5
        errors.append((*stated, seen))
    for before, after in zip(errors, errors[1:]):
        assert all(b < a for a, b in zip(before, after))
    assert errors[-1][0] < 0.02 and errors[-1][2] < 0.02


def test_what_ranks_give_back_is_what_is_measured():
    expert = make_expert(hidden=32, width=16)
    calibration = calibrated(expert)
    parts = lower(expert, calibration, BEAM, 2)
    told = facts(expert, calibration, BEAM, parts)
    whole = offer(expert, calibration, BEAM, 2, parts)
    assert told.bytes == whole.bytes == sum(m.bytes for m in parts.values())
    assert sum(map(sum, told.gains.values())) == pytest.approx(whole.loss)
    new = restore(expert, calibration, BEAM, parts, dict.fromkeys(parts, 4))
    left = sum(sum(gains[4:]) for gains in told.gains.values())
    assert left < measured_loss(expert, calibration, BEAM, new.parts) < left + 0.02 * whole.loss  # 8 bits of factors


def test_bits_go_where_they_matter():
    """Against everything that there is to choose, in both measures."""
    offers = {e: [Offer(bits, 100 * bits + 30, (e + 1) * 4.0**-bits, 2.0**-bits) for bits in (2, 3, 4, 8)] for e in range(5)}
    rows, weights = {e: 10.0 * (e + 1) for e in offers}, {e: 3.0 * (e % 2 + 1) for e in offers}
    for mix, cost in (("loss", lambda e, o: o.loss), ("importance", lambda e, o: weights[e] / sum(rows.values()) * o.error)):
        found = decide_bits(offers, Beam(bits=3, mix=mix), rows, weights)
        best = min(sum(cost(e, offers[e][j]) for e, j in enumerate(js)) for js in product(range(4), repeat=5)
                   if sum(offers[e][j].bytes for e, j in enumerate(js)) <= 5 * 330)
        chosen = {e: next(o for o in offers[e] if o.bits == found[e]) for e in offers}
        assert sum(o.bytes for o in chosen.values()) <= 5 * 330
        assert sum(cost(e, o) for e, o in chosen.items()) == pytest.approx(best)
    assert set(decide_bits(offers, Beam(bits=3)).values()) == {3}
    assert decide_bits(offers, Beam(bits=3, mix="loss"))[4] > 3 > decide_bits(offers, Beam(bits=3, mix="loss"))[0]


def told(kurtoses, hidden=6, width=4) -> dict[int, Lowered]:
    return {e: Lowered(50, 3 * hidden * width, (hidden, width), {part: [k * (e + 1) * 2.0**-r for r in range(4)]
                                                                for k, part in enumerate(("gate", "up", "down"), 1)}, kurt)
            for e, kurt in enumerate(kurtoses)}


@pytest.mark.parametrize("room", [0, 40, 100, 1000])
def test_ranks_within_a_budget_equal_brute_force(room):
    lowered = told([3.0, 5.0])
    budget = dict(bytes=2 * 50 + room, most_rank=2, group=8)
    size = [compensator_bytes(6, 4, r, factor_scheme(8, 8)) for r in range(3)]
    found = decide_ranks(lowered, Beam(ranks="loss", **budget))
    items = [(e, part) for e in lowered for part in lowered[e].gains]
    best = min(sum(sum(lowered[e].gains[part][r:]) for (e, part), r in zip(items, rs))
               for rs in product(range(3), repeat=6) if sum(size[r] for r in rs) <= room)
    assert sum(sum(lowered[e].gains[part][found[e][part]:]) for e, part in items) == pytest.approx(best)
    found = decide_ranks(lowered, Beam(ranks="kurtosis", **budget))
    best = max(3 * a + 5 * b for a, b in product(range(3), repeat=2) if 3 * (size[a] + size[b]) <= room)
    assert 3 * found[0]["up"] + 5 * found[1]["up"] == best
    found = decide_ranks(lowered, Beam(ranks="equal", **budget))
    assert found[0] == found[1] and found[0]["up"] == max(r for r in range(3) if 6 * size[r] <= room)
    for rule in ("loss", "kurtosis", "equal"):
        ranks = decide_ranks(lowered, Beam(ranks=rule, **budget))
        assert sum(size[r] for of_expert in ranks.values() for r in of_expert.values()) <= room


def test_no_budget_means_no_compensators():
    assert decide_ranks(told([3.0]), Beam()) == {0: {"gate": 0, "up": 0, "down": 0}}


def test_kurtosis():
    assert kurtosis(normal(400, 400)) == pytest.approx(3, abs=0.05)
    assert kurtosis(torch.tensor([[1.0, -1.0]])) == 1 and kurtosis(torch.zeros(2, 2)) == 0


def test_an_expert_without_tokens_gets_no_rank_and_is_still_quantised():
    expert = make_expert(hidden=16)
    empty = Calibration.zeros(16, 8, BEAM.needs, dtype=torch.float64)
    parts = lower(expert, empty, BEAM, 2)
    seen = make_expert(hidden=16, seed=5)
    lowered = {0: facts(expert, empty, BEAM, parts),
               1: facts(seen, calibrated(seen), BEAM, lower(seen, calibrated(seen), BEAM, 2))}
    ranks = decide_ranks(lowered, replace(BEAM, bytes=sum(low.bytes for low in lowered.values()) + 400))
    assert not any(ranks[0].values()) and any(ranks[1].values())
    assert relative_error(expert, empty, BEAM, parts) < 0.8


def test_refusals():
    for options, words in (({"bits": 5}, "5 bits cannot be packed"), ({"factor_bits": 3}, "factor_bits is 3"),
                           ({"bits": 3, "budget": 2.5}, "2.5 bits a weight is below the 3 bits"),
                           ({"quantiser": "awq"}, "must be one of gptq, hqq, rtn"), ({"rank_step": 0}, "rank_step is 0"),
                           ({"budget": 4.0, "bytes": 5}, "can't provide both")):
        with pytest.raises(CompressError, match=words):
            Beam(**options)
    with pytest.raises(CompressError, match="method beam has no option 'bit'"):
        build_beam(bit=3)
    with pytest.raises(CompressError, match="it is no phase of a run"):
        build_method("beam")
    expert = make_expert(hidden=16)
    with pytest.raises(CompressError, match="groups of 3 do not divide 8 inputs: choose a divisor, such as 2"):
        lower(expert, calibrated(expert), replace(BEAM, group=3), 2)
    with pytest.raises(CompressError, match="take 100 bytes with their scales, 5.556 bits a weight; the budget is 99, 5.500"):
        decide_ranks(told([3.0, 5.0]), Beam(bits=2, bytes=99))
    with pytest.raises(CompressError, match=r"rank 9 of a matrix \(8, 8\)"):
        compensate(normal(8, 8), 9, Weighting(None, None, 1.0), factor_scheme(8, 8))
    with pytest.raises(CompressError, match="1 bits cannot be packed: choose 2, 3, 4, 8"):
        round_to_nearest(normal(2, 8), Scheme(1, 8))
