"""Real ranks for tests: processes that join one gloo world and run functions until the tests end.

A pool of each size is started on first use and kept, since starting a process with torch costs seconds.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import traceback
from typing import Any, Callable

import torch.multiprocessing as mp

CALL_TIMEOUT_S = 120


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RankPool:
    """`world_size` processes in one process group."""

    def __init__(self, world_size: int):
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.close)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """`fn(world, *args)` on every rank; the results by rank. `fn` must be importable by name."""
        for pipe in self.pipes:
            pipe.send((fn, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(CALL_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} of {len(self.pipes)} did not answer in {CALL_TIMEOUT_S} s")
            ok, value = pipe.recv()
            results.append((ok, value))
        for rank, (ok, value) in enumerate(results):
            assert ok, f"rank {rank} of {len(self.pipes)} failed:\n{value}"
        return [value for _, value in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


@functools.lru_cache(maxsize=None)
def ranks(world_size: int) -> RankPool:
    """The shared pool of this size."""
    return RankPool(world_size)


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(world, *args)` on every rank of a world; a world of one runs in this process."""
    if world_size == 1:
        from moedist.world import World
        return [fn(World(), *args)]
    return ranks(world_size).run(fn, *args)


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    from moedist.config import WorldConfig
    from moedist.world import World
    torch.set_num_threads(1)
    with World.start(WorldConfig(device="cpu", timeout_s=CALL_TIMEOUT_S)) as world:
        while True:
            fn, args = pipe.recv()
            try:
                pipe.send((True, fn(world, *args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
