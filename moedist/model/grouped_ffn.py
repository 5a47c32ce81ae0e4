"""The expert feed-forward of many experts at once: one autograd function, one GEMM per expert and operand.

Autograd over a loop of `w[e]` writes a full-size gradient per expert, and one small GEMM split over all threads wastes most
of them. Here each GEMM writes its slice of preallocated results; neighbouring small experts form a group whose activation
is one call on values that are still in cache; and on a CPU each thread takes the next group when it is done with one, so
that threads never wait for each other inside a GEMM, and a slower core takes fewer.

All experts of a rank are stored neuron by neuron, one after another, so their widths may differ:
    w_in  [g * sum(F), D]: of each expert its F gate rows, then its F up rows (swiglu, g = 2), or its F rows (gelu, g = 1)
    w_out [sum(F), D]: row i is what hidden neuron i writes (the down projection, transposed)
R rows sorted by expert, D model width, F hidden width of an expert, n rows of one expert.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Iterator, Sequence

import torch

from moedist.model.activations import ACTIVATIONS, activate, activate_backward
from moedist.model.threads import in_threads

GROUP_VALUES = 2**17  # activations of one group: half a megabyte in float32, a part of a core's cache
GROUPS_PER_THREAD = 8  # enough to even out the threads


@dataclass(frozen=True)
class Slices:
    """Where one expert's rows and weights are, and its rows within its group."""

    rows: slice
    w_in: slice
    w_out: slice
    in_group: slice


@dataclass(frozen=True)
class Group:
    """Neighbouring experts of one width F with n rows in all; `hidden` is where their [n, g*F] pre-activations are."""

    experts: tuple[Slices, ...]
    count: int
    width: int
    hidden: slice

    @property
    def size(self) -> int:
        """n * F."""
        return self.count * self.width


def make_groups(counts: Sequence[int], widths: Sequence[int], gate: int, limit: int) -> list[Group]:
    """Groups of at most `limit` activations (or of one expert), without the experts that have no rows."""
    groups: list[Group] = []
    members: list[Slices] = []
    row = neuron = hidden = n = 0

    def close(width: int) -> None:
        nonlocal hidden, n
        if members:
            size = n * gate * width
            groups.append(Group(tuple(members), n, width, slice(hidden, hidden + size)))
            hidden, n = hidden + size, 0
            members.clear()

    last = 0
    for count, width in zip(counts, widths):
        if count and (width != last or (n + count) * width > limit):
            close(last)
        if count:
            members.append(Slices(slice(row, row + count), slice(gate * neuron, gate * (neuron + width)),
                                  slice(neuron, neuron + width), slice(n, n + count)))
            n, last = n + count, width
        row, neuron = row + count, neuron + width
    close(last)
    return groups


def forward_groups(counts: Sequence[int], widths: Sequence[int], gate: int) -> list[Group]:
    """The groups of a forward pass, for as many threads as there are."""
    values = sum(c * w for c, w in zip(counts, widths))
    return make_groups(counts, widths, gate, min(GROUP_VALUES, values // (GROUPS_PER_THREAD * torch.get_num_threads())))


def grouped_ffn(rows_RD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, counts: Sequence[int],
                widths: Sequence[int], activation: str,
                timed: Callable[[], ContextManager] = nullcontext) -> torch.Tensor:
    """[R, D]: every row through its expert's feed-forward.

    Args:
        rows_RD: rows sorted by expert, in the dtype of the weights.
        counts: rows of each expert, summing to R; zeros allowed.
        widths: hidden neurons of each expert.
        activation: swiglu, down(silu(gate x) * up x), or gelu (tanh form), down(gelu(up x)).
        timed: makes a context that the computation runs in, forward and again backward.

    Experts without rows get zero gradients, never None.
    """
    assert sum(counts) == len(rows_RD), f"counts sum to {sum(counts)} for {len(rows_RD)} rows"
    return _GroupedFFN.apply(rows_RD, w_in, w_out, list(counts), list(widths), activation, timed)


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, counts: list[int],
                widths: list[int], activation: str, timed: Callable[[], ContextManager]) -> torch.Tensor:
        values, gate = sum(c * w for c, w in zip(counts, widths)), ACTIVATIONS[activation]
        groups = forward_groups(counts, widths, gate)
        largest = max((group.size for group in groups), default=0)
        hidden, y = x.new_empty(values * gate), torch.empty_like(x)
        x, w_in, w_out = x.detach(), w_in.detach(), w_out.detach()

        def run(queue: Iterator[Group]) -> None:
            scratch = x.new_empty(largest)
            for group in queue:
                h, a = hidden[group.hidden].view(group.count, -1), scratch[:group.size].view(group.count, -1)
                for e in group.experts:
                    torch.mm(x[e.rows], w_in[e.w_in].t(), out=h[e.in_group])
                activate(h.chunk(gate, dim=1), a, activation)
                for e in group.experts:
                    torch.mm(a[e.in_group], w_out[e.w_out], out=y[e.rows])

        with timed():
            in_threads(run, groups, x.device)
        ctx.save_for_backward(x, w_in, w_out, hidden)
        ctx.groups, ctx.activation, ctx.timed = groups, activation, timed
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        x, w_in, w_out, hidden = ctx.saved_tensors
        gate, largest = ACTIVATIONS[ctx.activation], max((group.size for group in ctx.groups), default=0)
        dy = dy.contiguous()  # a sum's gradient arrives expanded
        grad_x = torch.empty_like(x)
        covered = sum(len(g.experts) * g.width for g in ctx.groups) == len(w_out)  # no expert without rows: all is written
        grad_in, grad_out = ((torch.empty_like if covered else torch.zeros_like)(w) for w in (w_in, w_out))

        def run(queue: Iterator[Group]) -> None:
            scratch = x.new_empty(2 + gate, largest)
            for group in queue:
                h = hidden[group.hidden].view(group.count, -1)
                a, grad_a = (buffer[:group.size].view(group.count, -1) for buffer in scratch[:2])
                grad_h = scratch[2:].flatten()[:h.numel()].view_as(h)
                for e in group.experts:
                    torch.mm(dy[e.rows], w_out[e.w_out].t(), out=grad_a[e.in_group])
                activate_backward(h.chunk(gate, dim=1), a, grad_a, grad_h.chunk(gate, dim=1), ctx.activation)
                for e in group.experts:
                    grad_h_e = grad_h[e.in_group]
                    torch.mm(a[e.in_group].t(), dy[e.rows], out=grad_out[e.w_out])
                    torch.mm(grad_h_e, w_in[e.w_in], out=grad_x[e.rows])
                    torch.mm(grad_h_e.t(), x[e.rows], out=grad_in[e.w_in])

        with ctx.timed():
            in_threads(run, ctx.groups, x.device)
        return grad_x, grad_in, grad_out, None, None, None, None
