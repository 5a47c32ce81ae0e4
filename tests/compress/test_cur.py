"""Joint CUR: which neurons stay, and what they write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress import Calibration, Cur, Expert, PruneMagnitude, PruneRandom
from moedist.compress.cur import SILENT, fit_down, magnitude
from moedist.errors import CompressError
from tests.compress.cases import calibrated, make_expert, normal, quick, same, seeds, tokens_of, trained

METHODS = [Cur(multiple=1), Cur(multiple=1, least_squares=False), PruneMagnitude(multiple=1), PruneRandom(multiple=1)]
each = pytest.mark.parametrize("method", METHODS, ids=repr)


def objective(h: torch.Tensor, down: torch.Tensor, kept: torch.Tensor, fitted: torch.Tensor, ridge: float) -> float:
    energy = h.square().sum(0)[kept]
    energy = energy.clamp(min=SILENT * energy.mean())
    pull = (energy.unsqueeze(1) * (fitted - down[kept]).square()).sum()
    return float((h @ down - h[:, kept] @ fitted).square().sum() + ridge * pull)


@given(st.integers(2, 20), st.integers(1, 6), st.floats(1e-6, 1.0), seeds, st.data())
@quick
def test_the_fit_is_the_least_of_its_objective(hidden, width, ridge, seed, data):
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, hidden - 1), min_size=1, max_size=hidden - 1))))
    h, down = normal(40, hidden, seed=seed), normal(hidden, width, seed=seed + 1)
    fitted = fit_down(down, h.t() @ h, kept, ridge)
    least = objective(h, down, kept, fitted, ridge)
    for k in range(4):
        step = 10.0 ** -k * normal(len(kept), width, seed=k)
        assert objective(h, down, kept, fitted + step, ridge) >= least * (1 - 1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_the_fit_is_least_squares_on_real_tokens(gated):
    expert = make_expert(gated=gated)
    x, _ = tokens_of(expert)
    h, kept = expert.neurons(x), torch.tensor([0, 2, 3, 7, 11, 12, 20])
    fitted = fit_down(expert.down, h.t() @ h, kept, 1e-12)
    expected = torch.linalg.lstsq(h[:, kept], h @ expert.down).solution
    assert torch.allclose(fitted, expected, atol=1e-8)
    default = fit_down(expert.down, h.t() @ h, kept)
    best, plain, ours = ((h @ expert.down - h[:, kept] @ d).norm() for d in (expected, expert.down[kept], default))
    assert best <= ours <= best * 1.001 and ours < plain


def test_all_kept_changes_nothing():
    expert = make_expert(dtype=torch.bfloat16)
    assert torch.equal(fit_down(expert.down, calibrated(expert).hidden_moment, torch.arange(24)), expert.down)


def test_scaling_a_neuron_against_its_down_row_changes_nothing():
    h, down, scale = normal(60, 24), normal(24, 8, seed=1), 2.0 ** normal(24, seed=5)
    kept = torch.arange(0, 24, 2)
    fitted = fit_down(down, h.t() @ h, kept)
    scaled = fit_down(down / scale.unsqueeze(1), (h * scale).t() @ (h * scale), kept)
    assert torch.allclose(scaled * scale[kept].unsqueeze(1), fitted, atol=1e-10)


def test_dead_duplicate_and_whispering_neurons():
    h, down = normal(50, 6), normal(6, 4, seed=1)
    h[:, 1], h[:, 3], h[:, 4] = 0.0, h[:, 2], 1e-12 * h[:, 5]
    moment = h.t() @ h
    fitted = fit_down(down, moment, torch.tensor([0, 1, 2, 4]))
    assert torch.equal(fitted[1], down[1])  # never fired: as trained
    assert torch.allclose(fitted[2], down[2] + down[3], atol=0.2)  # stands in for its double
    assert torch.allclose(fitted[3], down[4], atol=1e-3)  # does not shout in place of neuron 5
    both = fit_down(down, moment, torch.tensor([0, 2, 3, 5]))
    assert both.isfinite().all() and both.norm() < 10 * down.norm()


def test_float32_sums_of_few_tokens():
    expert = make_expert(96, 8, dtype=torch.float32)
    calibration = calibrated(expert, 20, dtype=torch.float32)
    kept = torch.arange(64)
    fitted = fit_down(expert.down, calibration.hidden_moment, kept)
    assert fitted.dtype == torch.float32 and fitted.norm() < 3 * expert.down.norm()


def test_what_is_not_a_moment_is_refused():
    moment = torch.tensor([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(CompressError, match="of 2 kept neurons is not positive: raise the ridge above 0.001"):
        fit_down(torch.ones(3, 2), moment, torch.tensor([0, 1]))


@each
def test_kept_neurons_are_real(method):
    for gated in (True, False):
        expert = make_expert(gated=gated)
        calibration = calibrated(expert)
        for kept in (1, 7, 23):
            small = method.compress(expert, calibration, {"neurons": kept})
            assert small.neurons.dtype == torch.int32 and torch.equal(small.neurons, small.neurons.sort().values)
            chosen = small.dense()
            for part in set(expert.parts) - ({"down"} if method.least_squares else set()):
                assert torch.equal(chosen.parts[part], expert.parts[part][small.neurons.long()])
            assert small.numbers == len(expert.parts) * kept * 8 and small.bytes == 8 * small.numbers + 4 * kept
            x, _ = tokens_of(expert)
            assert torch.allclose(small.padded()(x), chosen(x)) and small.padded().hidden == 24
        whole = method.compress(expert, calibration, {"neurons": 24})
        assert same(whole.dense(), expert) and same(whole.padded(), expert) and whole.neurons is None
        assert whole.bytes == 8 * expert.numbers


@each
def test_curves(method):
    expert = make_expert()
    (curve,) = method.gains(expert, calibrated(expert), {})
    assert curve.part == "neurons" and curve.units == 24 and (curve.gain.diff() <= 0).all()
    assert curve.gain.dtype == torch.float64 and curve.step == 1
    for kept in range(1, 25):
        assert curve.bytes(kept, 8) == method.compress(expert, calibrated(expert), {"neurons": kept}).bytes


@given(st.integers(1, 30), st.booleans(), seeds, st.data())
@quick
def test_permuting_neurons_permutes_the_kept_set(hidden, gated, seed, data):
    expert = make_expert(hidden, 6, gated, seed)
    x, _ = tokens_of(expert, seed=seed)
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    kept = data.draw(st.integers(1, hidden))
    for method in (Cur(1), PruneMagnitude(1)):
        one = method.compress(expert, calibrated(expert, seed=seed), {"neurons": kept})
        other = method.compress(expert.select(order), calibrated(expert.select(order), seed=seed), {"neurons": kept})
        if one.neurons is not None:
            assert sorted(order[other.neurons.long()].tolist()) == one.neurons.tolist()
        assert torch.allclose(one.dense()(x), other.dense()(x), atol=1e-9)


def test_cur_keeps_the_largest_fisher_scores():
    expert = make_expert()
    calibration = calibrated(expert)
    kept = Cur(1).compress(expert, calibration, {"neurons": 10}).neurons.long()
    dropped = torch.ones(24, dtype=torch.bool)
    dropped[kept] = False
    assert calibration.fisher[kept].min() >= calibration.fisher[dropped].max()


def test_an_expert_without_tokens():
    expert = make_expert()
    calibration = Calibration.zeros(24, 8, Cur().needs)
    (curve,) = Cur(1).gains(expert, calibration, {})
    assert not curve.gain.any()
    small = Cur(1).compress(expert, calibration, {"neurons": 5})
    assert sorted(magnitude(expert).sort(descending=True).indices[:5].tolist()) == small.neurons.tolist()
    assert same(small.dense(), expert.select(small.neurons))


def test_magnitude_ignores_the_scale_between_up_and_down():
    expert = make_expert()
    moved = Expert(expert.gate, expert.up * 4, expert.down / 4)
    assert torch.allclose(magnitude(moved), magnitude(expert))


def test_random_is_seeded():
    expert, calibration = make_expert(), calibrated(make_expert())
    drawn = [PruneRandom(1, seed=seed).compress(expert, calibration, {"neurons": 8}).neurons for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_zero_and_narrow_experts():
    zero = torch.zeros(6, 3, dtype=torch.float64)
    expert = Expert(zero, zero, zero)
    for method in METHODS:
        assert same(method.compress(expert, calibrated(expert), {"neurons": 2}).padded(), expert)
    thin = make_expert(1, 1)
    for method in METHODS:
        assert same(method.compress(thin, calibrated(thin), {"neurons": 1}).dense(), thin)


@pytest.mark.parametrize("gated", [True, False])
def test_moments_of_kept_neurons_are_theirs(gated):
    expert = make_expert(gated=gated)
    small = Cur(1).compress(expert, calibrated(expert), {"neurons": 9})
    moments = {part: normal(24, 8, seed=i) for i, part in enumerate(expert.parts)}
    for second in (False, True):
        mapped = small.map_moments(moments.get("gate"), moments["up"], moments["down"], second)
        assert mapped.keys() == small.parts.keys()
        for part, named in mapped.items():
            assert torch.equal(named["weight"], moments[part][small.neurons.long()])


@pytest.mark.parametrize("gated", [True, False])
def test_scores_and_the_fit_are_worth_something_on_a_trained_expert(gated):
    expert, calibration, x = trained(gated=gated)
    keep = {"neurons": 20}

    def error(method):
        return float((method.compress(expert, calibration, keep).dense()(x) - expert(x)).norm() / expert(x).norm())

    fitted, bare = error(Cur(1)), error(Cur(1, least_squares=False))
    at_random = sorted(error(PruneRandom(1, True, seed=seed)) for seed in range(5))
    assert fitted < at_random[0] and fitted < 0.8 * bare
    assert at_random[-1] < error(PruneRandom(1))


def test_options_are_checked():
    for options in ({"multiple": 0}, {"ridge": 0.0}, {"ridge": float("nan")}):
        with pytest.raises(CompressError, match="at least 1, and above 0"):
            Cur(**options)
    for kept in (0, 25, None):
        with pytest.raises(CompressError, match=f"cannot keep {kept} units of neurons, which has 24"):
            Cur().compress(make_expert(), calibrated(make_expert()), {"neurons": kept})
