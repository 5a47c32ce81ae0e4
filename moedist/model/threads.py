"""One queue of jobs for all threads of a rank: each takes the next when it is done with one.

So threads never wait for each other inside a small GEMM, and a slower core takes fewer.
"""

from __future__ import annotations

import functools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, Protocol, Sequence, TypeVar

import torch


class Sized(Protocol):
    """A job that knows how long it takes, next to others."""

    @property
    def size(self) -> int:
        """In any unit."""


Job = TypeVar("Job", bound=Sized)


def in_threads(run: Callable[[Iterator[Job]], None], jobs: Sequence[Job], device: torch.device) -> None:
    """Call `run` with all jobs, on a CPU in every thread with a queue that they share, largest first.

    Results do not depend on who takes which job, as long as each writes slices of its own.
    """
    threads = torch.get_num_threads()
    if not _shared(len(jobs), device):
        with torch.no_grad():
            run(iter(jobs))
        return
    queue = _SharedQueue(sorted(jobs, key=lambda job: -job.size))
    futures = [_pool(threads).submit(_without_grad, run, queue) for _ in range(threads)]
    for future in futures:
        future.result()


def as_in_threads(run: Callable[[], None], jobs: int, device: torch.device) -> None:
    """Call `run` where `in_threads` would do so many jobs, in one of its threads: a GEMM gives the same bits only there."""
    if _shared(jobs, device):
        _pool(torch.get_num_threads()).submit(torch.no_grad()(run)).result()
    else:
        run()


def _shared(jobs: int, device: torch.device) -> bool:
    """Whether there are enough jobs to share."""
    threads = torch.get_num_threads()
    return device.type == "cpu" and threads > 1 and jobs >= 2 * threads


class _SharedQueue:
    """An iterator that several threads may draw from: taking from a deque is atomic."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs = deque(jobs)

    def __iter__(self) -> Iterator[Job]:
        while True:
            try:
                yield self._jobs.popleft()
            except IndexError:
                return


def _without_grad(run: Callable[[Iterator[Job]], None], queue: _SharedQueue) -> None:
    with torch.no_grad():  # grad mode is a property of the thread
        run(iter(queue))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # set_num_threads is per thread: each worker's GEMMs run on itself alone
    return ThreadPoolExecutor(threads, "moedist-expert", initializer=lambda: torch.set_num_threads(1))
