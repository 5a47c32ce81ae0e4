"""The expert feed-forward of many experts at once: one autograd function, one GEMM per expert and operand.

Autograd over a loop of `w[e]` writes a full-size gradient per expert, and one small GEMM split over all threads wastes
most of them. Here each GEMM writes its slice of preallocated results, and on a CPU each thread takes a contiguous run of
experts, so that threads never wait for each other inside a GEMM.

All experts of a rank are stored neuron by neuron, one after another, so their widths may differ:
    w_in  [g * sum(F), D]: of each expert its F gate rows, then its F up rows (swiglu, g = 2), or its F rows (gelu, g = 1)
    w_out [sum(F), D]: row i is what hidden neuron i writes (the down projection, transposed)
R rows sorted by expert, D model width, F hidden width of an expert.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch.nn import functional as F

ACTIVATIONS = {"swiglu": 2, "gelu": 1}  # rows of w_in per hidden neuron


@dataclass(frozen=True)
class Slices:
    """Where one expert's rows and weights are: half-open ranges."""

    rows: slice
    w_in: slice
    w_out: slice
    width: int


def expert_slices(counts: Sequence[int], widths: Sequence[int], gate: int) -> list[Slices]:
    """One `Slices` per expert that has rows."""
    found, row, neuron = [], 0, 0
    for count, width in zip(counts, widths):
        if count:
            found.append(Slices(slice(row, row + count), slice(gate * neuron, gate * (neuron + width)),
                                slice(neuron, neuron + width), width))
        row, neuron = row + count, neuron + width
    return found


def grouped_ffn(rows_RD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, counts: Sequence[int],
                widths: Sequence[int], activation: str) -> torch.Tensor:
    """[R, D]: every row through its expert's feed-forward.

    Args:
        rows_RD: rows sorted by expert, in the dtype of the weights.
        counts: rows of each expert, summing to R; zeros allowed.
        widths: hidden neurons of each expert.
        activation: swiglu, down(silu(gate x) * up x), or gelu (tanh form), down(gelu(up x)).

    Experts without rows get zero gradients, never None.
    """
    assert sum(counts) == len(rows_RD), f"counts sum to {sum(counts)} for {len(rows_RD)} rows"
    return _GroupedFFN.apply(rows_RD, w_in, w_out, list(counts), list(widths), activation)


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, counts: list[int],
                widths: list[int], activation: str) -> torch.Tensor:
        ctx.experts = expert_slices(counts, widths, ACTIVATIONS[activation])
        ctx.activation = activation
        hidden, y = x.new_empty(_hidden_size(ctx.experts) * ACTIVATIONS[activation]), torch.empty_like(x)
        x, w_in, w_out = x.detach(), w_in.detach(), w_out.detach()

        def run(experts: list[Slices], start: int) -> None:
            for group, h, a in _by_width(experts, hidden, start, activation):
                for e, r in group:
                    torch.mm(x[e.rows], w_in[e.w_in].t(), out=h[r])
                _activate(h, a, activation)
                for e, r in group:
                    torch.mm(a[r], w_out[e.w_out], out=y[e.rows])

        _in_threads(run, ctx.experts, x.device)
        ctx.save_for_backward(x, w_in, w_out, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, w_in, w_out, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        gate, activation = ACTIVATIONS[ctx.activation], ctx.activation
        grad_x = torch.empty_like(x)
        covered = sum(e.width for e in ctx.experts) == len(w_out)  # every expert has rows: each slice is written
        grad_in, grad_out = ((torch.empty_like if covered else torch.zeros_like)(w) for w in (w_in, w_out))
        grad_hidden = torch.empty_like(hidden)

        def run(experts: list[Slices], start: int) -> None:
            for group, h, a in _by_width(experts, hidden, start, activation):
                offset = h.storage_offset()
                grad_h = grad_hidden[offset:offset + h.numel()].view_as(h)
                grad_a = torch.empty_like(a)
                for e, r in group:
                    torch.mm(grad[e.rows], w_out[e.w_out].t(), out=grad_a[r])
                _activate_backward(h, a, grad_a, grad_h, activation)
                for e, r in group:
                    torch.mm(a[r].t(), grad[e.rows], out=grad_out[e.w_out])
                    torch.mm(grad_h[r], w_in[e.w_in], out=grad_x[e.rows])
                    torch.mm(grad_h[r].t(), x[e.rows], out=grad_in[e.w_in])

        assert hidden.numel() == _hidden_size(ctx.experts) * gate
        _in_threads(run, ctx.experts, x.device)
        return grad_x, grad_in, grad_out, None, None, None


def _hidden_size(experts: list[Slices]) -> int:
    return sum((e.rows.stop - e.rows.start) * e.width for e in experts)


def _by_width(experts: list[Slices], hidden: torch.Tensor, start: int, activation: str):
    """Runs of neighbouring experts of one width, each with its pre-activations [n, g*F] and a buffer [n, F].

    Yields ([(expert, its rows in the buffers)], hidden view, activation buffer); equal widths make one run, so that the
    activation is one call.
    """
    gate, i = ACTIVATIONS[activation], 0
    while i < len(experts):
        j = i
        while j < len(experts) and experts[j].width == experts[i].width:
            j += 1
        first, width = experts[i].rows.start, experts[i].width
        rows = experts[j - 1].rows.stop - first
        h = hidden[start:start + rows * gate * width].view(rows, gate * width)
        group = [(e, slice(e.rows.start - first, e.rows.stop - first)) for e in experts[i:j]]
        yield group, h, hidden.new_empty(rows, width)
        start, i = start + h.numel(), j


def _activate(h: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=1)
        torch.mul(F.silu(gate), up, out=out)
    else:
        out.copy_(F.gelu(h, approximate="tanh"))


def _activate_backward(h: torch.Tensor, a: torch.Tensor, grad_a: torch.Tensor, grad_h: torch.Tensor,
                       activation: str) -> None:
    """Fill `grad_h`, and recompute the activation into `a` on the way: cheaper than having kept it."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=1)
        silu = F.silu(gate)
        torch.mul(silu, up, out=a)
        torch.mul(grad_a, silu, out=grad_h[:, up.shape[1]:])
        grad_h[:, :up.shape[1]] = torch.ops.aten.silu_backward(grad_a.mul_(up), gate)
    else:
        a.copy_(F.gelu(h, approximate="tanh"))
        grad_h.copy_(torch.ops.aten.gelu_backward(grad_a, h, approximate="tanh"))


def _in_threads(run: Callable[[list[Slices], int], None], experts: list[Slices], device: torch.device) -> None:
    """Call `run(experts, offset of their hidden values)` for all experts, on a CPU in parts of about equal work."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(experts) < 2 * threads:
        with torch.no_grad():
            run(experts, 0)
        return
    parts = _equal_work(experts, threads)
    futures = [_pool(threads).submit(_without_grad, run, part, offset) for part, offset in parts]
    for future in futures:
        future.result()


def _without_grad(run: Callable, part: list[Slices], offset: int) -> None:
    with torch.no_grad():  # grad mode is a property of the thread
        run(part, offset)


def _equal_work(experts: list[Slices], parts: int) -> list[tuple[list[Slices], int]]:
    """Contiguous runs of experts, each with where its hidden values start, of about equal rows * width."""
    work = [(e.rows.stop - e.rows.start) * e.width for e in experts]
    total, done, found = sum(work), 0, []
    current: list[Slices] = []
    start = 0
    gate = (experts[0].w_in.stop - experts[0].w_in.start) // experts[0].width
    for e, w in zip(experts, work):
        if current and done + w / 2 > total * (len(found) + 1) / parts:
            found.append((current, start))
            current, start = [], done * gate
        current.append(e)
        done += w
    found.append((current, start))
    return found


@functools.lru_cache(maxsize=None)
def _pool(threads: int) -> ThreadPoolExecutor:
    # set_num_threads is per thread: each worker's GEMMs run on itself alone
    return ThreadPoolExecutor(threads, "moedist-expert", initializer=lambda: torch.set_num_threads(1))
