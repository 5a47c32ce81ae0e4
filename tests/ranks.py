"""Real ranks for tests: processes that join one world and run functions until the tests end.

A pool of each size and transport is started on first use and kept, since starting a process with torch costs seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Callable

import pytest
import torch.multiprocessing as mp

import moedist.mpi
from moedist.errors import WorldError

CALL_TIMEOUT_S = 120
START_TIMEOUT_S = 120
ROOT = Path(__file__).parents[1]
# by the process that ranks are forked from; of no use, but slow, where it is another's already
IMPORTED = ["moedist.trainer", "torch.distributed.checkpoint", "torch._dynamo", "tests.ranks"]


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def needs(lacking: str) -> None:
    """Skip the test where something is lacking here, fail it under CI=true; `lacking` says what, in words."""
    if lacking:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(lacking)


@functools.lru_cache(maxsize=None)
def mpirun(ranks: int) -> tuple[str, ...]:
    """How this machine's MPI starts so many processes; skips the test where there is no MPI, fails it under CI=true."""
    try:
        return tuple(moedist.mpi.mpirun(ranks))
    except WorldError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


class RankPool:
    """`world_size` processes in one world, over any transport; those of MPI are started by mpirun."""

    def __init__(self, world_size: int, transport: str):
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        if transport == "mpi":
            self._start_by_mpirun(world_size)
        else:
            self._start(world_size)
        atexit.register(self.close)

    def _start(self, world_size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        port = free_port()
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, "torchdist", rank, world_size, port), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def _start_by_mpirun(self, world_size: int) -> None:
        """The ranks call back, and say which they are."""
        key = bytes(multiprocessing.current_process().authkey)
        with Listener(("127.0.0.1", 0), backlog=world_size, authkey=key) as listener:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOEDIST_TEST_KEY": key.hex(), "OMP_NUM_THREADS": "1"}
            self.processes.append(subprocess.Popen([*mpirun(world_size), sys.executable, "-m", "tests.ranks",
                                                    str(listener.address[1])], cwd=ROOT, env=environment))
            listener._listener._socket.settimeout(START_TIMEOUT_S)  # Listener has no time-out of its own
            connections = [listener.accept() for _ in range(world_size)]
        self.pipes = [c for _, c in sorted(((c.recv(), c) for c in connections), key=lambda entry: entry[0])]

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
        for pipe in self.pipes:
            pipe.close()  # ranks end when they read no more
        for process in self.processes:
            if isinstance(process, subprocess.Popen):  # mpirun, which would say that a rank was killed
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            process.kill()


@functools.lru_cache(maxsize=None)
def ranks(world_size: int, transport: str = "torchdist") -> RankPool:
    """The shared pool of this size and transport."""
    return RankPool(world_size, transport)


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, transport: str = "torchdist") -> list[Any]:
    """`fn(world, *args)` on every rank of a world; a world of one runs in this process."""
    if world_size == 1:
        from moedist.world import World
        return [fn(World(), *args)]
    try:
        return ranks(world_size, transport).run(fn, *args)
    except TimeoutError:
        ranks.cache_clear()  # these hang for good: the next test gets others
        raise


def _serve(pipe: Connection, transport: str, rank: int = 0, world_size: int = 1, port: int = 0) -> None:
    if world_size > 1:  # without a launcher that says it
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    from moedist.config import WorldConfig
    from moedist.world import World, leave_process
    torch.set_num_threads(1)
    with World.start(WorldConfig(device="cpu", timeout_s=CALL_TIMEOUT_S, transport=transport)) as world:
        while True:
            try:
                fn, args = pipe.recv()
            except EOFError:
                break
            try:
                pipe.send((True, fn(world, *args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    leave_process()


def _serve_mpi(port: int) -> None:
    """A process that mpirun has started."""
    from moedist.rendezvous.launch import find_launch
    key = bytes.fromhex(os.environ.pop("MOEDIST_TEST_KEY"))
    multiprocessing.current_process().authkey = key  # tensors are sent by connections of their own
    pipe = Client(("127.0.0.1", port), authkey=key)
    pipe.send(find_launch().rank)
    _serve(pipe, "mpi")


if __name__ == "__main__":
    _serve_mpi(int(sys.argv[1]))
