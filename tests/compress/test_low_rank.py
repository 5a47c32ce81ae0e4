"""The SVD baselines and the interpolative form."""

import pytest
import torch
from hypothesis import given

from moedist.compress import Dense, Expert, Interp, Interpolated, Svd, SvdFisher, SvdWhitened, TwoFactors
from moedist.compress.low_rank import LARGEST, interpolate
from moedist.compress.weighting import best_low_rank, spectrum, weighting
from moedist.errors import CompressError
from tests.compress.cases import (PLAIN, calibrated, decaying, make_expert, normal, quick, same, seeds, shapes_and_ranks,
                                  tokens_of)

METHODS = [Svd(), SvdWhitened(), SvdFisher(), Interp()]


@given(shapes_and_ranks(), seeds)
@quick
def test_gauge_form_is_the_product(shape, seed):
    m, n, r = shape
    x, y = normal(m, r, seed=seed), normal(r, n, seed=seed + 1)
    stored = interpolate(x, y, torch.float64)
    assert (stored.dense() - x @ y).abs().max() < 1e-10 * (1 + (x @ y).abs().max())
    assert stored.numbers == r * (m + n - r) and len(stored.kept) == r
    assert torch.equal(stored.kept, stored.kept.sort().values)
    assert torch.equal(stored.dense()[stored.kept.long()], stored.basis)
    if len(stored.rest):
        assert stored.rest.abs().max() <= LARGEST * (1 + 1e-9)


def test_rows_are_exchanged_where_pivots_alone_leave_large_entries():
    """Kahan's matrix, on which QR with pivoting is known to choose badly."""
    n, c = 30, 0.285
    kahan = torch.triu(torch.full((n, n), -c, dtype=torch.float64), 1) + torch.eye(n, dtype=torch.float64)
    kahan *= (1 - c**2) ** (torch.arange(n, dtype=torch.float64).unsqueeze(1) / 2)
    kahan *= 1 - 1e-6 * torch.arange(n, dtype=torch.float64)  # so that pivoting keeps the columns in order
    x = kahan[:n - 1].t()  # as rows of X, [30, 29]
    without = torch.linalg.solve(x[:n - 1], x[n - 1:], left=False)
    assert without.abs().max() > 10 * LARGEST
    stored = interpolate(x, torch.eye(n - 1, dtype=torch.float64), torch.float64)
    assert stored.rest.abs().max() <= LARGEST
    assert (stored.dense() - x).abs().max() < 1e-10


@given(shapes_and_ranks(), seeds)
@quick
def test_rows_of_the_matrix_itself_interpolate_within_the_strong_bound(shape, seed):
    m, n, r = shape
    w = decaying(m, n, seed)
    x, y = best_low_rank(w, r, PLAIN)
    stored = interpolate(x, y, torch.float64)
    kept = stored.kept.long()
    real = Interpolated(stored.kept, stored.rest, w[kept]).dense()
    sigma = torch.linalg.svdvals(w)
    following = float(sigma[r]) if r < len(sigma) else 0.0
    bound = (1 + LARGEST**2 * r * (m - r)) ** 0.5 * following
    assert torch.linalg.matrix_norm(w - real, 2) <= bound * (1 + 1e-9) + 1e-10


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_compressed_is_the_best_of_its_rank_in_its_norm(method, gated):
    expert = make_expert(14, 10, gated)
    calibration = calibrated(expert)
    keep = dict(zip(expert.parts, (3, 1, 4)))
    compressed = method.compress(expert, calibration, keep)
    assert compressed.neurons is None
    for curve, (part, weight) in zip(method.gains(expert, calibration, {}), expert.parts.items()):
        norm, matrix = weighting(part, calibration, method.norm, method.ridge), compressed.parts[part]
        x, y = best_low_rank(weight, keep[part], norm)
        assert (matrix.dense() - x @ y).abs().max() < 1e-10
        values = spectrum(weight, norm)
        error = norm.scale * norm.apply(weight - matrix.dense()).square().sum()
        assert abs(error - values[keep[part]:].sum()) <= 1e-9 * values.sum()
        assert curve.part == part and torch.equal(curve.gain, values)
        assert curve.bytes(keep[part], 8) == matrix.bytes


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_curves_count_what_is_stored_at_every_rank(method):
    for hidden, width in ((9, 6), (6, 9), (1, 5), (5, 1), (1, 1)):
        expert = make_expert(hidden, width)
        calibration = calibrated(expert)
        curves = method.gains(expert, calibration, {})
        for kept in range(1, min(hidden, width) + 1):
            compressed = method.compress(expert, calibration, dict.fromkeys(expert.parts, kept))
            assert [curve.bytes(kept, 8) for curve in curves] == [m.bytes for m in compressed.parts.values()]
        assert same(compressed.dense(), expert) and all(isinstance(m, Dense) for m in compressed.parts.values())
        for curve in curves:
            assert curve.units == min(hidden, width) and len(curve.indices) == len(curve.numbers) == curve.units + 1
            assert list(curve.numbers) == sorted(curve.numbers) and curve.numbers[-1] == hidden * width


@pytest.mark.parametrize("method", [Svd(), SvdWhitened(), SvdFisher()], ids=lambda method: type(method).__name__)
def test_factors_are_balanced(method):
    """Gradients are small; were their scale left in the factors, one learning rate could not train both."""
    expert = make_expert(14, 10)
    for matrix in method.compress(expert, calibrated(expert), {"gate": 3, "up": 3, "down": 3}).parts.values():
        assert torch.allclose(matrix.left.norm(dim=0), matrix.right.norm(dim=1))


def test_whitening_is_the_best_for_the_outputs_of_real_tokens():
    expert = make_expert(14, 10)
    x, _ = tokens_of(expert)
    calibration = calibrated(expert)
    white = SvdWhitened(ridge=1e-9).compress(expert, calibration, {"gate": 3, "up": 3, "down": 3}).dense()
    plain = Svd().compress(expert, calibration, {"gate": 3, "up": 3, "down": 3}).dense()
    for part in ("gate", "up"):
        output = x @ expert.parts[part].t()
        u, s, vh = torch.linalg.svd(output, full_matrices=False)
        best = (output - u[:, :3] @ torch.diag(s[:3]) @ vh[:3]).norm()
        assert (output - x @ white.parts[part].t()).norm() == pytest.approx(float(best), rel=1e-4)
        assert (output - x @ plain.parts[part].t()).norm() > best
    h = expert.neurons(x)
    assert (h @ (expert.down - white.down)).norm() < (h @ (expert.down - plain.down)).norm()


def test_degenerate_weights():
    one = torch.outer(normal(9), normal(6, seed=1))
    zero = torch.zeros_like(one)
    for method in METHODS:
        for gate, up, down in ((zero, zero, zero), (one, one, one), (one, zero, one)):
            expert = Expert(gate, up, down)
            compressed = method.compress(expert, calibrated(expert), {"gate": 2, "up": 2, "down": 2})
            for part, weight in expert.parts.items():
                dense = compressed.parts[part].dense()
                assert dense.isfinite().all() and (dense - weight).abs().max() < 1e-8
                assert all(tensor.isfinite().all() for tensor in compressed.parts[part].tensors().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    expert = make_expert(14, 10, dtype=dtype)
    calibration = calibrated(expert, dtype=torch.float32)
    for method in METHODS:
        compressed = method.compress(expert, calibration, {"gate": 5, "up": 5, "down": 5})
        assert all(t.dtype == dtype for m in compressed.parts.values() for t in m.tensors().values())
        wide = method.compress(Expert.of({p: m.double() for p, m in expert.parts.items()}), calibration,
                               {"gate": 5, "up": 5, "down": 5})
        for part in expert.parts:
            change = (compressed.dense().parts[part].double() - wide.dense().parts[part]).norm()
            assert change < 10 * torch.finfo(dtype).eps * expert.parts[part].double().norm()


def test_options_are_checked():
    with pytest.raises(CompressError, match="norm is 'left'; it must be one of plain, inputs, both"):
        Svd(norm="left")
    with pytest.raises(CompressError, match="multiple is 0"):
        Interp(multiple=0)
    with pytest.raises(CompressError, match="at least 1 and 1e-9"):
        Interp(ridge=float("nan"))
    expert = make_expert(14, 10)
    with pytest.raises(CompressError, match="cannot keep 11 units of up, which has 10"):
        Svd().compress(expert, calibrated(expert), {"gate": 2, "up": 11, "down": 2})
    with pytest.raises(CompressError, match="cannot keep None units of gate"):
        Svd().compress(expert, calibrated(expert), {})


def test_ranks_in_multiples():
    expert = make_expert(14, 10)
    assert {curve.step for curve in Interp(multiple=4).gains(expert, calibrated(expert), {})} == {4}
    assert {curve.step for curve in Interp(multiple=64).gains(expert, calibrated(expert), {})} == {10}


def test_two_factors_where_they_are_smaller_only():
    expert = make_expert(14, 10)
    kept = Svd().compress(expert, calibrated(expert), {"gate": 5, "up": 6, "down": 9}).parts
    assert [type(matrix) for matrix in kept.values()] == [TwoFactors, Dense, Dense]  # 24 r < 140
