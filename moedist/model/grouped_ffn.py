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

import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Iterator, Sequence

import torch

ACTIVATIONS = {"swiglu": 2, "gelu": 1}  # rows of w_in per hidden neuron
aten = torch.ops.aten


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
    def values(self) -> int:
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
        values = sum(c * w for c, w in zip(counts, widths))
        limit = min(GROUP_VALUES, values // (GROUPS_PER_THREAD * torch.get_num_threads()))
        groups = make_groups(counts, widths, ACTIVATIONS[activation], limit)
        largest = max((group.values for group in groups), default=0)
        hidden, y = x.new_empty(values * ACTIVATIONS[activation]), torch.empty_like(x)
        x, w_in, w_out = x.detach(), w_in.detach(), w_out.detach()

        def run(queue: Iterator[Group]) -> None:
            scratch = x.new_empty(largest)
            for group in queue:
                h, a = hidden[group.hidden].view(group.count, -1), scratch[:group.values].view(group.count, -1)
                for e in group.experts:
                    torch.mm(x[e.rows], w_in[e.w_in].t(), out=h[e.in_group])
                _activate(h, a, activation)
                for e in group.experts:
                    torch.mm(a[e.in_group], w_out[e.w_out], out=y[e.rows])

        with timed():
            _in_threads(run, groups, x.device)
        ctx.save_for_backward(x, w_in, w_out, hidden)
        ctx.groups, ctx.activation, ctx.timed = groups, activation, timed
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        x, w_in, w_out, hidden = ctx.saved_tensors
        largest = max((group.values for group in ctx.groups), default=0)
        dy = dy.contiguous()  # a sum's gradient arrives expanded
        grad_x = torch.empty_like(x)
        covered = sum(len(g.experts) * g.width for g in ctx.groups) == len(w_out)  # no expert without rows: all is written
        grad_in, grad_out = ((torch.empty_like if covered else torch.zeros_like)(w) for w in (w_in, w_out))

        def run(queue: Iterator[Group]) -> None:
            scratch = x.new_empty(2 + ACTIVATIONS[ctx.activation], largest)
            for group in queue:
                h = hidden[group.hidden].view(group.count, -1)
                a, grad_a = (buffer[:group.values].view(group.count, -1) for buffer in scratch[:2])
                grad_h = scratch[2:].flatten()[:h.numel()].view_as(h)
                for e in group.experts:
                    torch.mm(dy[e.rows], w_out[e.w_out].t(), out=grad_a[e.in_group])
                _activate_backward(h, a, grad_a, grad_h, ctx.activation)
                for e in group.experts:
                    grad_h_e = grad_h[e.in_group]
                    torch.mm(a[e.in_group].t(), dy[e.rows], out=grad_out[e.w_out])
                    torch.mm(grad_h_e, w_in[e.w_in], out=grad_x[e.rows])
                    torch.mm(grad_h_e.t(), x[e.rows], out=grad_in[e.w_in])

        with ctx.timed():
            _in_threads(run, ctx.groups, x.device)
        return grad_x, grad_in, grad_out, None, None, None, None


def _activate(h: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=1)
        aten.silu.out(gate, out=out)
        out.mul_(up)
    else:
        aten.gelu.out(h, approximate="tanh", out=out)


def _activate_backward(h: torch.Tensor, a: torch.Tensor, grad_a: torch.Tensor, grad_h: torch.Tensor,
                       activation: str) -> None:
    """Fill `grad_h`, and recompute the activation into `a` on the way: cheaper than having kept it. Spoils `grad_a`."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=1)
        grad_gate, grad_up = grad_h.chunk(2, dim=1)
        aten.silu.out(gate, out=a)
        torch.mul(grad_a, a, out=grad_up)
        a.mul_(up)
        aten.silu_backward.grad_input(grad_a.mul_(up), gate, grad_input=grad_gate)
    else:
        aten.gelu.out(h, approximate="tanh", out=a)
        aten.gelu_backward.grad_input(grad_a, h, approximate="tanh", grad_input=grad_h)


def _in_threads(run: Callable[[Iterator[Group]], None], groups: list[Group], device: torch.device) -> None:
    """Call `run` with all groups, on a CPU in every thread with a queue that they share, largest first.

    Results do not depend on who takes which group: each writes slices of its own.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(groups) < 2 * threads:
        with torch.no_grad():
            run(iter(groups))
        return
    queue = _SharedQueue(sorted(groups, key=lambda group: -group.values))
    futures = [_pool(threads).submit(_without_grad, run, queue) for _ in range(threads)]
    for future in futures:
        future.result()


class _SharedQueue:
    """An iterator that several threads may draw from: taking from a deque is atomic."""

    def __init__(self, groups: list[Group]):
        self._groups = deque(groups)

    def __iter__(self) -> Iterator[Group]:
        while True:
            try:
                yield self._groups.popleft()
            except IndexError:
                return


def _without_grad(run: Callable[[Iterator[Group]], None], queue: _SharedQueue) -> None:
    with torch.no_grad():  # grad mode is a property of the thread
        run(iter(queue))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # set_num_threads is per thread: each worker's GEMMs run on itself alone
    return ThreadPoolExecutor(threads, "moedist-expert", initializer=lambda: torch.set_num_threads(1))
