"""The bank of experts in any form against the dense matrices that the forms stand for, forward and backward."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.compress import Compressed
from moedist.model import ExpertBank, FactoredBank, build_bank
from moedist.model.chains import chains_of, up
from moedist.model.forms import indices_of, tensors_of
from tests.model.expert_forms import KINDS, expert_of, fill, forms_of

D = 6
EXACT = {"rtol": 1e-10, "atol": 1e-10}
MIXED = ("interp", "two dense interp", "cur", "dense", "interp cur two", "interp")


def bank_of(experts: dict[int, Compressed], activation: str, dtype: torch.dtype = torch.float64):
    bank = build_bank(3, list(experts), list(forms_of(experts).values()), D, activation, dtype=dtype)
    fill(bank, experts)
    return bank


def by_autograd(experts, x, counts, grad):
    """(outputs, gradient of x, gradients by (expert, name)) of plain dense mathematics."""
    x, leaves, parts = x.detach().requires_grad_(), {}, []
    for (e, expert), rows in zip(experts.items(), x.split(counts)):
        tensors = {name: t.detach().requires_grad_() for name, t in tensors_of(expert).items()}
        leaves |= {(e, name): t for name, t in tensors.items()}
        form = forms_of(experts)[e]
        parts.append(form.stored(tensors, indices_of(expert), expert.hidden).dense()(rows))
    y = torch.cat(parts)
    y.backward(grad)
    return y.detach(), x.grad, {key: torch.zeros_like(t) if t.grad is None else t.grad for key, t in leaves.items()}


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def mixtures(draw):
    """Experts of any forms, widths and ranks, and their rows."""
    gated = draw(st.booleans())
    experts, counts = {}, []
    for e in range(draw(st.integers(1, 7))):
        kinds = " ".join(draw(st.sampled_from(KINDS)) for _ in range(3))
        hidden = draw(st.integers(1, 9))
        experts[2 * e] = expert_of(kinds, hidden, D, draw(st.integers(1, 4)), gated, draw(st.integers(0, 99)),
                                   draw(st.sampled_from([None, hidden + 3])))
        counts.append(draw(st.integers(0, 5)))
    return experts, counts, "swiglu" if gated else "gelu"


@pytest.mark.parametrize("count", [1, 2])
def test_equals_dense_mathematics(count):
    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(mixtures())
    def check(case):
        experts, counts, activation = case
        bank = bank_of(experts, activation)
        dense = all(form.is_dense for form in bank.forms)
        assert isinstance(bank, ExpertBank if dense else FactoredBank)
        x = torch.randn(sum(counts), D, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(sum(counts), D, dtype=torch.float64)
        y = bank(x, counts)
        y.backward(grad)
        expected, grad_x, grads = by_autograd(experts, x, counts, grad)
        torch.testing.assert_close(y.detach(), expected, **EXACT)
        torch.testing.assert_close(x.grad, grad_x, **EXACT)
        found = bank.split_by_name(tuple(p.grad for p in bank.parameters()))
        assert found.keys() == {f"layers.3.experts.{e}.{name}" for e, name in grads}
        for (e, name), value in grads.items():
            torch.testing.assert_close(found[f"layers.3.experts.{e}.{name}"], value, **EXACT)

    with threads(count):
        check()


def test_threads_give_the_same_bits_and_both_passes_are_timed():
    experts = {e: expert_of(kinds, 5 + e, D, 3, seed=e) for e, kinds in enumerate(MIXED)}
    counts, results, entered = [4, 0, 7, 3, 1, 5], [], []

    @contextlib.contextmanager
    def timed():
        entered.append(None)
        yield

    for count in (1, 2):
        with threads(count):
            bank = bank_of(experts, "swiglu")
            x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = bank(x, counts, timed)
            y.sum().backward()  # a sum's gradient is expanded
            results.append((y.detach(), x.grad, bank.flat.grad))
    for one, two in zip(*results):
        assert torch.equal(one, two)
    assert len(entered) == 4


def test_experts_without_rows_have_zero_gradients():
    experts = {e: expert_of(kinds, 4, D, seed=e) for e, kinds in enumerate(MIXED)}
    for counts in ([0] * 6, [0, 3, 0, 0, 2, 0]):
        bank = bank_of(experts, "swiglu")
        x = torch.randn(sum(counts), D, dtype=torch.float64, requires_grad=True)
        bank(x, counts).sum().backward()
        for e, count in zip(bank.expert_ids, counts):
            assert bool(bank.blocks_of(e, (bank.flat.grad,))[0].any()) == (count > 0)


def test_a_rank_without_experts():
    bank = build_bank(0, [], [], D, "swiglu")
    assert isinstance(bank, ExpertBank) and not bank.indices.numel()
    assert bank(torch.zeros(0, D), []).shape == (0, D)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_low_precision_is_close(dtype, tolerance):
    """Rows come in the compute dtype, weights stay in float32 and get float32 gradients."""
    experts = {e: expert_of(kinds, 16, D, 4, seed=e) for e, kinds in enumerate(MIXED)}
    counts = [5] * len(experts)
    exact, rounded = bank_of(experts, "swiglu"), bank_of(experts, "swiglu", torch.float32)
    x = torch.randn(30, D, dtype=torch.float64)
    expected, y = exact(x, counts), rounded(x.to(dtype), counts)
    expected.square().sum().backward()
    y.float().square().sum().backward()
    assert y.dtype == dtype and rounded.flat.grad.dtype == torch.float32
    for a, b in ((y, expected), (rounded.flat.grad, exact.flat.grad)):
        assert ((a.double() - b).abs().max() / b.abs().max()).item() < tolerance


def test_numbers_lie_in_the_same_order_in_both_kinds():
    """So an expert moves between banks as a run of numbers; its index vectors likewise."""
    expert, other = expert_of("dense", 5, D, before=9), expert_of("interp", 4, D, seed=1, before=7)
    dense, mixed = bank_of({1: expert}, "swiglu"), bank_of({0: other, 1: expert}, "swiglu")
    runs = [torch.cat([b.flatten() for b in bank.blocks_of(1, bank.weights())]) for bank in (dense, mixed)]
    assert torch.equal(*runs) and torch.equal(dense.indices_of(1), mixed.indices_of(1))
    assert torch.equal(dense.indices, expert.neurons)
    assert dense.flops_per_row == [2 * 3 * 5 * D] and mixed.flops_per_row == [2 * other.numbers, 2 * 3 * 5 * D]
    assert mixed.widths == [4, 5]


def test_written_index_vectors_count_from_the_next_call():
    expert = expert_of("interp", 6, D, 3)
    bank = build_bank(0, [0], [forms_of({0: expert})[0]], D, "swiglu", dtype=torch.float64)
    assert torch.equal(bank.named_indices()["layers.0.experts.0.w3.kept"], torch.arange(3, dtype=torch.int32))
    x = torch.randn(4, D, dtype=torch.float64)
    bank.initialise(0, 0.5, 0.5)
    bank(x, [4])
    fill(bank, {0: expert})
    torch.testing.assert_close(bank(x, [4]), expert.dense()(x), **EXACT)


def test_work_per_row_is_one_multiply_add_a_number():
    """An interpolative matrix costs r (J + D - r): the identity in it is never multiplied."""
    from torch.utils.flop_counter import FlopCounterMode
    expert = expert_of("interp", 8, D, 3)
    bank = bank_of({0: expert}, "swiglu")
    chain, *_ = bank.chains()[0]
    with FlopCounterMode(display=False) as counter:
        v = torch.randn(D, 10, dtype=torch.float64)
        up(chain, bank.flat.detach(), v, [v.new_empty(factor.rows, 10) for factor in chain])
    assert counter.get_total_flops() == 10 * 2 * 3 * (8 + D - 3) == 10 * 2 * expert.parts["gate"].numbers


def test_initial_weights_do_not_depend_on_the_bank():
    experts = {e: expert_of("interp" if e else "dense", 5, D) for e in range(3)}
    whole, part = bank_of(experts, "swiglu"), bank_of({0: experts[0]}, "swiglu")
    for bank in (whole, part):
        bank.initialise(1, 0.02, 0.01)
    for name, value in part.named_weights().items():
        assert torch.equal(value, whole.named_weights()[name])


def test_chains_follow_the_form():
    expert = expert_of("interp dense cur", 5, D, 2)
    bank = bank_of({0: expert}, "swiglu")
    gate, up_, down = chains_of(bank.forms[0], 0, bank.indices)
    assert [f.shape for f in (*gate, *up_, *down)] == [(3, 2), (2, D), (5, D), (5, 2), (2, 2), (2, D)]
    kept = expert.parts["gate"].kept.long()
    assert torch.equal(gate[0].order, torch.cat([kept, expert.parts["gate"].others]))
    assert torch.equal(gate[0].order[gate[0].inverse], torch.arange(5))
