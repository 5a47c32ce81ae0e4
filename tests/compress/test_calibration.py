"""Calibration sums against autograd, and their additivity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress import ALL_NEEDS, Calibration, Cur, Expert, Interp, calibrate, calibration_bytes
from moedist.errors import CompressError
from tests.compress.cases import calibrated, make_expert, normal, quick, seeds, tokens_of


def by_autograd(expert: Expert, x: torch.Tensor, router: torch.Tensor, target: torch.Tensor):
    """Values and gradients, token by token, of a loss with the router's weights in it."""
    up = (x @ expert.up.t()).requires_grad_()
    gate = None if expert.gate is None else (x @ expert.gate.t()).requires_grad_()
    if gate is None:
        h = torch.nn.functional.gelu(up, approximate="tanh")
    else:
        h = torch.nn.functional.silu(gate) * up
    h.retain_grad()
    y = h @ expert.down
    y.retain_grad()
    (router.unsqueeze(1) * y - target).pow(4).mean().backward()
    return gate, up, h, y.grad


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 6), st.booleans(), seeds)
@quick
def test_all_sums_are_those_of_autograd(n, hidden, width, gated, seed):
    expert = make_expert(hidden, width, gated, seed)
    x, target = normal(n, width, seed=seed), normal(n, width, seed=seed + 1)
    router = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gate, up, h, grad_y = by_autograd(expert, x, router, target)
    sums = calibrate(expert, x, grad_y, router, dtype=torch.float64)
    expected = {"rows": torch.tensor(float(n)), "weight": router.sum(), "input_moment": x.t() @ x,
                "hidden_moment": h.t() @ h, "up_grad_moment": up.grad.t() @ up.grad,
                "output_grad_moment": grad_y.t() @ grad_y, "fisher": (h * h.grad).square().sum(0)}
    if gated:
        expected["gate_grad_moment"] = gate.grad.t() @ gate.grad
    assert sums.tensors().keys() == expected.keys()
    for name, tensor in sums.tensors().items():
        right = expected[name].detach().double()
        assert torch.allclose(tensor, right, rtol=1e-9, atol=1e-14 * float(right.abs().max())), name


def test_fisher_is_the_change_of_loss_for_one_neuron_less():
    """To first order in a neuron that hardly matters, token by token."""
    expert = make_expert(6, 4)
    x, target = normal(30, 4), normal(30, 4, seed=1)
    expert.down[2] *= 1e-6
    loss = (expert(x) - target).square().sum(1)
    grad = 2 * (expert(x) - target)
    without = expert.select(torch.tensor([0, 1, 3, 4, 5]))
    change = (without(x) - target).square().sum(1) - loss
    assert float(calibrate(expert, x, grad, dtype=torch.float64).fisher[2]) == pytest.approx(
        float(change.square().sum()), rel=1e-4)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=5), st.booleans(), seeds)
@quick
def test_batches_ranks_and_copies_add_up(sizes, gated, seed):
    expert = make_expert(7, 5, gated, seed)
    x, grad = tokens_of(expert, sum(sizes), seed)
    whole = calibrate(expert, x, grad, dtype=torch.float64)
    total = Calibration.zeros(7, 5, ALL_NEEDS, gated, torch.float64)
    for some_x, some_grad in zip(x.split(sizes), grad.split(sizes)):
        total = total + calibrate(expert, some_x, some_grad, dtype=torch.float64)
    assert total.tensors().keys() == whole.tensors().keys()
    for name, tensor in total.tensors().items():
        assert torch.allclose(tensor, whole.tensors()[name], rtol=1e-10, atol=1e-18), name


def test_no_tokens():
    expert = make_expert()
    none = calibrate(expert, torch.zeros(0, 8), torch.zeros(0, 8))
    zeros = Calibration.zeros(24, 8, ALL_NEEDS)
    for name, tensor in none.tensors().items():
        assert torch.equal(tensor, zeros.tensors()[name]) and tensor.dtype == zeros.tensors()[name].dtype


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("needs", [ALL_NEEDS, Cur().needs, Interp().needs, frozenset()])
def test_only_what_is_needed_is_collected_and_its_bytes_are_stated(needs, gated):
    expert = make_expert(gated=gated)
    for calibration in (calibrated(expert, needs=needs, dtype=torch.float32),
                        Calibration.zeros(24, 8, needs, gated)):
        names = set(needs) - (set() if gated else {"gate_grad_moment"})
        assert set(calibration.tensors()) == names | {"rows", "weight"}
        assert sum(tensor.nbytes for tensor in calibration.tensors().values()) == calibration_bytes(24, 8, needs, gated)
        calibration.check(expert, needs)


def test_of_kept_neurons():
    expert = make_expert()
    kept = torch.tensor([1, 4, 9], dtype=torch.int32)
    part, whole = calibrated(expert).select(kept), calibrated(expert)
    small = calibrated(expert.select(kept))
    for name in ("rows", "weight", "input_moment", "hidden_moment", "output_grad_moment", "gate_grad_moment",
                 "up_grad_moment", "fisher"):
        assert torch.allclose(part.tensors()[name], small.tensors()[name], rtol=1e-10), name
    assert whole.select(None) is whole


def test_weights_of_another_dtype_and_gradients_that_are_on():
    expert = make_expert(dtype=torch.bfloat16)
    wanted = Expert.of({part: matrix.requires_grad_() for part, matrix in expert.parts.items()})
    x, grad = tokens_of(expert)
    sums = calibrate(wanted, x, grad, torch.ones(200, dtype=torch.bfloat16))
    assert all(not tensor.requires_grad for tensor in sums.tensors().values())
    assert sums.fisher.dtype == torch.float32 and float(sums.weight) == 200


def test_wrong_calibrations_are_refused_with_words():
    expert = make_expert()
    some = calibrated(expert, needs={"fisher"})
    with pytest.raises(CompressError, match=r"needs hidden_moment, calibrated were \['fisher', 'rows', 'weight'\]"):
        some.check(expert, Cur().needs)
    with pytest.raises(CompressError, match=r"fisher has shape \(24,\) for an expert that needs \(20,\)"):
        some.check(make_expert(20), {"fisher"})
    some.fisher[3:5] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(CompressError, match="fisher of an expert with 200 tokens holds 2 values of 24 that are not finite"):
        some.check(expert, {"fisher"})
    with pytest.raises(ValueError, match="different content"):
        some + calibrated(expert)
    with pytest.raises(ValueError, match="does not know"):
        calibrated(expert, needs={"variance"})
