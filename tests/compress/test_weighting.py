"""The weighted norm, and the best low rank in it."""

import pytest
import torch
from hypothesis import given

from moedist.compress import Calibration
from moedist.compress.weighting import MOST_RIDGE, Weighting, best_low_rank, norm_needs, spectrum, square_root, weighting
from moedist.errors import CompressError
from tests.compress.cases import PLAIN, calibrated, make_expert, normal, positive, quick, seeds, shapes_and_ranks


def norm_of(m: int, n: int, seed: int) -> Weighting:
    return Weighting(square_root(positive(m, seed), 1e-6), square_root(positive(n, seed + 1), 1e-6), 0.25)


@given(shapes_and_ranks(), seeds)
@quick
def test_eckart_young(shape, seed):
    m, n, r = shape
    w, norm = normal(m, n, seed=seed), norm_of(m, n, seed)
    x, y = best_low_rank(w, r, norm)
    assert x.shape == (m, r) and y.shape == (r, n) and torch.linalg.matrix_rank(x) == r
    error = norm.scale * norm.apply(w - x @ y).square().sum()
    values = spectrum(w, norm)
    assert values.dtype == torch.float64 and (values.diff() <= 0).all()
    assert abs(error - values[r:].sum()) <= 1e-10 * values.sum()
    for k in range(3):  # no other matrix of this rank is nearer
        other = (x + 1e-3 * normal(m, r, seed=k)) @ (y + 1e-3 * normal(r, n, seed=k + 9))
        assert norm.scale * norm.apply(w - other).square().sum() >= error * (1 - 1e-9)


@given(shapes_and_ranks(), seeds)
@quick
def test_undo_undoes(shape, seed):
    m, n, _ = shape
    norm, a = norm_of(m, n, seed), normal(m, n, seed=seed)
    assert torch.allclose(norm.undo_left(norm.apply_left(a)), a, atol=1e-8)
    assert torch.allclose(norm.undo_right(norm.apply_right(a)), a, atol=1e-8)
    assert torch.equal(PLAIN.apply(a), a) and torch.equal(PLAIN.undo_left(PLAIN.undo_right(a)), a)


@pytest.mark.parametrize("gated", [True, False])
def test_norms_are_their_traces(gated):
    expert = make_expert(gated=gated)
    calibration = calibrated(expert)
    c, rows = calibration, float(calibration.rows)
    by_part = {"gate": (c.gate_grad_moment, c.input_moment), "up": (c.up_grad_moment, c.input_moment),
               "down": (c.hidden_moment, c.output_grad_moment)}
    for part, weight in expert.parts.items():
        change, (left, right) = normal(*weight.shape), by_part[part]
        both = weighting(part, calibration, "both", 1e-9)
        assert both.scale * both.apply(change).square().sum() == pytest.approx(
            float((left @ change @ right @ change.t()).trace() / rows), rel=1e-6)
        inputs = weighting(part, calibration, "inputs", 1e-9)
        expected = (change.t() @ left @ change).trace() if part == "down" else (change @ right @ change.t()).trace()
        assert inputs.scale * inputs.apply(change).square().sum() == pytest.approx(float(expected), rel=1e-6)


def test_the_norm_is_the_change_of_loss_of_independent_tokens():
    """The mean over pairs (gradient of one token, input of another) is the product of the means, with no assumption."""
    expert = make_expert(6, 4)
    calibration, n = calibrated(expert, 30), 30
    x, g = normal(n, 4, seed=1), normal(n, 6, seed=2)
    calibration = Calibration(**{**calibration.tensors(), "input_moment": x.t() @ x, "up_grad_moment": g.t() @ g})
    change = normal(6, 4, seed=3)
    expected = (g @ change @ x.t()).square().sum() / n
    norm = weighting("up", calibration, "both", 1e-9)
    assert norm.scale * norm.apply(change).square().sum() == pytest.approx(float(expected), rel=1e-6)


def test_no_tokens_and_no_gradients():
    expert = make_expert()
    none = weighting("up", Calibration.zeros(24, 8, norm_needs("both"), dtype=torch.float64), "both", 1e-6)
    assert none.left is none.right is None and none.scale == 0
    assert torch.equal(spectrum(expert.up, none), torch.zeros(8, dtype=torch.float64))


def test_needs():
    assert norm_needs("plain") == frozenset()
    assert norm_needs("inputs") == {"input_moment", "hidden_moment"}
    assert norm_needs("both") == {"input_moment", "hidden_moment", "gate_grad_moment", "up_grad_moment",
                                  "output_grad_moment"}


def test_square_root():
    a = positive(5)
    root = square_root(a, 1e-6)
    lifted = a + 1e-6 * a.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    assert torch.allclose(root @ root.t(), lifted, atol=1e-10) and torch.equal(root, root.tril())
    assert square_root(torch.zeros(3, 3), 1e-6) is None
    assert torch.equal(a, positive(5))  # not written to


def test_rounded_sums_are_lifted():
    """One loud direction and few tokens in float32: the ridge alone does not make the sums positive."""
    x = normal(40, 400, dtype=torch.float32) * 1e-4 + torch.linspace(1, 2, 400)
    moment = x.t() @ x
    lowest = torch.linalg.eigvalsh(moment.double()).min() / moment.diagonal().mean()
    assert lowest < -1e-9  # this is such a case
    root = square_root(moment, 1e-9)
    assert root is not None and root.isfinite().all()
    assert (root @ root.t() - moment).norm() <= 1e-4 * moment.norm()


def test_what_is_not_a_moment_is_refused():
    with pytest.raises(CompressError, match=rf"\[2, 2\] is not positive, even with {MOST_RIDGE:g}"):
        square_root(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1e-6)
