"""Quantisers against references in plain float64 loops, and what each must be better at."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress.gptq import clipped_grid, gptq
from moedist.compress.quantise import Quantised, Scheme, half_quadratic, range_grid, round_to_nearest
from moedist.errors import CompressError
from tests.compress.cases import decaying, normal, positive, quick, seeds

BITS = [2, 3, 4, 8]


@st.composite
def schemes(draw) -> tuple[Scheme, int, int]:
    """A scheme, and a shape that it takes."""
    group, ragged = draw(st.integers(1, 9)), draw(st.booleans())
    columns = draw(st.integers(1, 20)) if ragged else group * draw(st.integers(1, 3))
    return Scheme(draw(st.sampled_from(BITS)), group, draw(st.booleans()), ragged), draw(st.integers(1, 5)), columns


def reference(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Round to nearest, one group at a time."""
    out, levels = np.zeros_like(weight), 2**scheme.bits - 1
    for r in range(weight.shape[0]):
        for start in range(0, weight.shape[1], scheme.group):
            w = weight[r, start:start + scheme.group]
            if scheme.symmetric:
                scale, zero = float(np.float16(2 * np.abs(w).max() / levels)), levels / 2
            else:
                low, high = min(0.0, w.min()), max(0.0, w.max())
                scale = float(np.float16((high - low) / levels))
                step = levels / 255
                zero = np.clip(np.round(-low / scale / step), 0, 255) * step if scale else 0.0
            codes = np.clip(np.round((w / scale if scale else 0 * w) + zero), 0, levels)
            out[r, start:start + scheme.group] = scale * (codes - zero)
    return out


@quick
@given(schemes(), seeds)
def test_round_to_nearest_equals_the_reference(case, seed):
    scheme, rows, columns = case
    weight = normal(rows, columns, seed=seed)
    found = round_to_nearest(weight, scheme)
    assert np.allclose(found.dense(torch.float64), reference(weight.numpy(), scheme), rtol=0, atol=1e-12)
    assert found.shape == (rows, columns) and found.bytes == scheme.bytes(rows, columns)
    step = found.scales.double().repeat_interleave(scheme.group, 1)[:, :columns]
    error = (found.dense(torch.float64) - weight).abs()
    edge = 2**scheme.bits / 255 + 2**-10 * 2**scheme.bits  # rounded zero and scale reach a little less far
    assert (error <= step * (0.5 + edge) + 1e-6).all()


@quick
@given(schemes(), seeds)
def test_all_give_what_they_say_they_store(case, seed):
    scheme, rows, columns = case
    weight, moment = normal(rows, columns, seed=seed), positive(columns, seed % 1000)
    for found in (half_quadratic(weight, scheme), gptq(weight, moment, scheme), gptq(weight, 0 * moment, scheme)):
        assert isinstance(found, Quantised) and found.bytes == scheme.bytes(rows, columns)
        assert found.dense(torch.float64).isfinite().all()
        for part in (slice(0, 1), slice(rows - 1, rows)):
            assert torch.equal(found.rows(part, torch.float32), found.dense()[part]), "a block is part of the whole"


def plain_gptq(weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, damping: float) -> torch.Tensor:
    """Equations 2 and 3 as they stand: the inverse of what is left of H, anew for every column; the grids as given there."""
    weight, columns = weight.clone(), weight.shape[1]
    moment = moment + damping * moment.diagonal().mean() * torch.eye(columns, dtype=moment.dtype)
    inverses = [torch.linalg.inv(moment[i:, i:]) for i in range(columns)]
    importance = torch.stack([1 / inverse[0, 0] for inverse in inverses])
    found = torch.empty_like(weight)
    for i in range(columns):
        if i % scheme.group == 0:
            part = slice(i, min(columns, i + scheme.group))
            grid = clipped_grid(weight[:, part], importance[part], Scheme(scheme.bits, part.stop - i, scheme.symmetric))
        single = type(grid)(grid.scales, grid.zeros, Scheme(scheme.bits, 1, scheme.symmetric))
        found[:, i] = single.values(single.codes(weight[:, i:i + 1])).squeeze(1)
        error = (weight[:, i] - found[:, i]) / inverses[i][0, 0]
        weight[:, i:] -= torch.outer(error, inverses[i][0])
    return found


@quick
@given(schemes(), seeds)
def test_gptq_equals_its_equations(case, seed):
    scheme, rows, columns = case
    weight, moment = normal(rows, columns, seed=seed), positive(columns, seed % 1000)
    found = gptq(weight, moment, scheme, damping=0.02).dense(torch.float64)
    assert torch.allclose(found, plain_gptq(weight, moment, scheme, 0.02), atol=1e-6)


def error(weight: torch.Tensor, found: Quantised, moment: torch.Tensor | None = None) -> float:
    left = weight - found.dense(torch.float64)
    return float((left * (left if moment is None else left @ moment)).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_best_for_the_inputs_it_has_seen(bits, symmetric):
    scheme = Scheme(bits, 16, symmetric)
    inputs = normal(200, 64, seed=1) @ decaying(64, 64)  # correlated, as activations are
    weight, moment = normal(32, 64), inputs.t() @ inputs
    rounded, fitted, seen = round_to_nearest(weight, scheme), half_quadratic(weight, scheme), gptq(weight, moment, scheme)
    assert error(weight, seen, moment) < 0.7 * min(error(weight, rounded, moment), error(weight, fitted, moment))
    power = [float((weight - q.dense(torch.float64)).abs().pow(0.7).sum()) for q in (rounded, fitted)]
    assert power[1] <= power[0], "the fit keeps no round that is worse in its own measure"
    assert bits > 2 or symmetric or power[1] < 0.99 * power[0]


def test_clipped_grids_are_no_worse_than_whole_ranges():
    weight = normal(8, 32)
    ones = torch.ones(32, dtype=torch.float64)
    for scheme in (Scheme(2, 16), Scheme(2, 16, True), Scheme(3, 32)):
        errors = [(weight - g.values(g.codes(weight))).square().view(8, -1, scheme.group).sum(2)
                  for g in (clipped_grid(weight, ones, scheme), range_grid(weight, scheme))]
        assert (errors[0] <= errors[1]).all() and errors[0].sum() < errors[1].sum()


def test_groups_of_one_value_are_kept():
    for value in (0.0, 0.5, -0.5):
        weight = torch.full((2, 8), value, dtype=torch.float64)
        for symmetric in (False, True):
            for quantise in (round_to_nearest, half_quadratic):
                assert torch.allclose(quantise(weight, Scheme(3, 4, symmetric)).dense(torch.float64), weight, atol=1e-3)


def test_refusals():
    with pytest.raises(CompressError, match="5 bits cannot be packed"):
        Scheme(5)
    with pytest.raises(CompressError, match="groups of 64 do not divide 72 inputs: choose a divisor, such as 36"):
        round_to_nearest(normal(2, 72), Scheme(3, 64))
    broken = normal(2, 8)
    broken[0, 3] = torch.nan
    with pytest.raises(CompressError, match="holds 1 values of 16 that are not finite"):
        half_quadratic(broken, Scheme(3, 8))
    with pytest.raises(CompressError, match=r"a moment \(4, 4\) does not belong to 8 inputs"):
        gptq(normal(2, 8), positive(4), Scheme(3, 8))
    with pytest.raises(CompressError, match="above the 65504 of float16"):
        round_to_nearest(1e6 * normal(2, 8), Scheme(2, 8))
