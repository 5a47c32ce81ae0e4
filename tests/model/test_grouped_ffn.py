"""The grouped feed-forward against a plain loop, its gradients against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moedist.model.activations import ACTIVATIONS
from moedist.model.grouped_ffn import grouped_ffn, make_groups
from moedist.model.threads import in_threads

D = 6


def make(counts, widths, activation, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g = ACTIVATIONS[activation]
    shapes = [(sum(counts), D), (g * sum(widths), D), (sum(widths), D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def reference(x, w_in, w_out, counts, widths, activation):
    """Expert after expert, by autograd."""
    g, row, neuron, parts = ACTIVATIONS[activation], 0, 0, []
    for count, width in zip(counts, widths):
        h = x[row:row + count] @ w_in[g * neuron:g * (neuron + width)].t()
        a = F.silu(h[:, :width]) * h[:, width:] if activation == "swiglu" else F.gelu(h, approximate="tanh")
        parts.append(a @ w_out[neuron:neuron + width])
        row, neuron = row + count, neuron + width
    return torch.cat(parts) if parts else x.clone()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_equals_a_plain_loop(activation, threads):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 5)), min_size=1, max_size=12), st.booleans())
    def check(experts, same_width):
        counts = [c for c, _ in experts]
        widths = [3 if same_width else w for _, w in experts]
        ours, theirs = make(counts, widths, activation), make(counts, widths, activation)
        y, expected = (f(*t, counts, widths, activation) for f, t in ((grouped_ffn, ours), (reference, theirs)))
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        for out in (y, expected):
            (out * probe).sum().backward()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad, rtol=1e-10, atol=1e-10)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradcheck_with_an_expert_without_rows(activation):
    counts, widths = [2, 0, 1], [2, 3, 1]
    assert torch.autograd.gradcheck(lambda *t: grouped_ffn(*t, counts, widths, activation), make(counts, widths, activation))


def test_expanded_gradients_and_no_experts():
    x, w_in, w_out = make([3, 2], [2, 2], "swiglu")
    grouped_ffn(x, w_in, w_out, [3, 2], [2, 2], "swiglu").sum().backward()  # a sum's gradient is expanded
    assert x.grad.shape == x.shape
    x, w_in, w_out = make([], [], "gelu")
    grouped_ffn(x, w_in, w_out, [], [], "gelu").sum().backward()
    assert w_in.grad.shape == (0, D)


def test_wrong_counts_are_refused():
    with pytest.raises(AssertionError, match="counts sum to 4 for 5 rows"):
        grouped_ffn(*make([5], [2], "gelu"), [4], [2], "gelu")


def test_groups_by_hand():
    found = make_groups([2, 0, 3, 1, 4], [4, 4, 4, 6, 6], gate=2, limit=20)
    # experts 0 and 2 make 5 * 4 = 20 values; 3 is wider; 4 would make 5 * 6 = 30
    assert [(g.count, g.width, g.hidden) for g in found] == [
        (5, 4, slice(0, 40)), (1, 6, slice(40, 52)), (4, 6, slice(52, 100))]
    first, second = found[0].experts
    assert (first.rows, first.w_in, first.w_out, first.in_group) == (slice(0, 2), slice(0, 8), slice(0, 4), slice(0, 2))
    assert (second.rows, second.w_in, second.w_out, second.in_group) == (
        slice(2, 5), slice(16, 24), slice(8, 12), slice(2, 5))
    assert make_groups([0, 0], [3, 3], 2, 10) == [] == make_groups([], [], 2, 10)


def test_threads_share_the_groups():
    groups = make_groups(list(range(1, 40)), [3] * 39, gate=2, limit=0)
    taken = []

    def run(queue):
        mine = list(queue)
        taken.append(mine)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        in_threads(run, groups, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert len(taken) == 3
    assert sorted((g.hidden.start for part in taken for g in part)) == [g.hidden.start for g in groups]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_is_close(dtype, tolerance):
    counts, widths = [5, 3], [4, 4]
    exact = make(counts, widths, "swiglu")
    y = grouped_ffn(*(t.detach().to(dtype) for t in exact), counts, widths, "swiglu")
    expected = reference(*exact, counts, widths, "swiglu")
    assert ((y.double() - expected).abs().max() / expected.abs().max()).item() < tolerance
