"""The feed-forward of many experts at once whose matrices are stored in factors: thin GEMMs, expert after expert.

As in `moedist.model.grouped_ffn` there is one autograd function, every GEMM writes its slice of preallocated results, no
expert is padded to the widest, and on a CPU the threads share a queue, here of experts. All weights are one flat tensor.
What a row of an expert costs is one multiply-add for each number that the expert stores.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Iterator, Sequence

import torch

from moedist.model.activations import activate, activate_backward
from moedist.model.chains import Chain, down, down_gradients, up, up_gradients
from moedist.model.threads import in_threads


@dataclass(frozen=True)
class Job:
    """One expert with n > 0 rows.

    Attributes:
        rows: where its rows are.
        chains: of gate and up, or of the only input projection, and of down.
        saved: where the vectors that backward needs are, see `vectors`.
        size: multiply-adds.
    """

    rows: slice
    chains: tuple[Chain, ...]
    saved: slice
    size: int

    def vectors(self, saved: torch.Tensor) -> list[list[torch.Tensor]]:
        """Views [.., n] for each chain: v_0 .. v_{k-1} of input projections, u_2 .. u_k of down."""
        count, flat = self.rows.stop - self.rows.start, iter(saved[self.saved].split(self.lengths()))
        *inputs, last = self.chains
        return [*([next(flat).view(factor.rows, count) for factor in chain] for chain in inputs),
                [next(flat).view(factor.rows, count) for factor in last[1:]]]

    def lengths(self) -> list[int]:
        """Of those vectors."""
        count = self.rows.stop - self.rows.start
        *inputs, last = self.chains
        return [factor.rows * count for chain in (*inputs, last[1:]) for factor in chain]


def make_jobs(chains: Sequence[Sequence[Chain]], counts: Sequence[int]) -> list[Job]:
    """One for each expert that has rows."""
    jobs, row, start = [], 0, 0
    for of_expert, count in zip(chains, counts):
        if count:
            numbers = sum(factor.where.stop - factor.where.start for chain in of_expert for factor in chain)
            job = Job(slice(row, row + count), tuple(of_expert), slice(0, 0), numbers * count)
            stop = start + sum(job.lengths())
            jobs.append(Job(job.rows, job.chains, slice(start, stop), job.size))
            start = stop
        row += count
    return jobs


def grouped_factors(rows_RD: torch.Tensor, weights: torch.Tensor, chains: Sequence[Sequence[Chain]], counts: Sequence[int],
                    activation: str, timed: Callable[[], ContextManager] = nullcontext) -> torch.Tensor:
    """[R, D]: every row through its expert's feed-forward.

    Args:
        rows_RD: rows sorted by expert, in the dtype of the weights.
        weights: flat; `chains` say where the factors of each expert's gate, up and down (gelu: up and down) are.
        counts: rows of each expert, summing to R; zeros allowed.
        activation: swiglu, down(silu(gate x) * up x), or gelu (tanh form), down(gelu(up x)).
        timed: makes a context that the computation runs in, forward and again backward.

    Experts without rows get zero gradients, never None.
    """
    assert sum(counts) == len(rows_RD), f"counts sum to {sum(counts)} for {len(rows_RD)} rows"
    return _GroupedFactors.apply(rows_RD, weights, make_jobs(chains, counts), all(counts), activation, timed)


class _GroupedFactors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor, jobs: list[Job], covered: bool, activation: str,
                timed: Callable[[], ContextManager]) -> torch.Tensor:
        saved, y = x.new_empty(jobs[-1].saved.stop if jobs else 0), torch.empty_like(x)
        x, weights = x.detach(), weights.detach()

        def run(queue: Iterator[Job]) -> None:
            for job in queue:
                *inputs, last = job.vectors(saved)
                for chain, vectors in zip(job.chains, inputs):
                    up(chain, weights, x[job.rows].t(), vectors)
                h = [vectors[0] for vectors in inputs]
                a = torch.empty_like(h[0])
                activate(h, a, activation)
                down(job.chains[-1], weights, a, last, y[job.rows])

        with timed():
            in_threads(run, jobs, x.device)
        ctx.save_for_backward(x, weights, saved)
        ctx.jobs, ctx.covered, ctx.activation, ctx.timed = jobs, covered, activation, timed
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        x, weights, saved = ctx.saved_tensors
        dy = dy.contiguous()  # a sum's gradient arrives expanded
        grad_x = torch.empty_like(x)
        grad = (torch.empty_like if ctx.covered else torch.zeros_like)(weights)

        def run(queue: Iterator[Job]) -> None:
            for job in queue:
                *inputs, last = job.vectors(saved)
                h = [vectors[0] for vectors in inputs]
                a, grad_a, *grad_h = torch.empty(2 + len(h), *h[0].shape, dtype=x.dtype, device=x.device)
                rows, of_rows, of_chains = x[job.rows], dy[job.rows], job.chains
                # the activation is needed for the last factor's gradient, its own gradient only after that
                activate(h, a, ctx.activation)
                up_gradients(of_chains[-1], weights, grad, [a, *last], of_rows, grad_a)
                activate_backward(h, a, grad_a, grad_h, ctx.activation)
                for i, (chain, vectors) in enumerate(zip(of_chains, inputs)):
                    down_gradients(chain, weights, grad, [*vectors[1:], rows.t()], grad_h[i], grad_x[job.rows], add=i > 0)

        with ctx.timed():
            in_threads(run, ctx.jobs, x.device)
        return grad_x, grad, None, None, None, None
