"""Rows by MPI, as bytes, through host memory: what ranks of different vendors can share, and the quickest for small rows.

A rank that waits here tests its requests in a loop instead of blocking inside MPI. So it can give its core to others where
there are more ranks than cores, notice that it has waited longer than `world.timeout_s` (MPI has no time-outs), and let
Python's other threads run.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from itertools import accumulate
from typing import Any, Sequence

import torch

from moedist.dispatch.staging import Staging
from moedist.dispatch.transport import Pending, Transport
from moedist.errors import WorldError
from moedist.world import World

MOST_ROWS = 2**31 - 1  # MPI counts and places rows in a C int, whatever the bytes of a row
CLOCK_EVERY = 1024


class MpiTransport(Transport):
    """MPI over `world.mpi`. Needs mpi4py, which `World.start` has imported and started."""

    def __init__(self, world: World):
        from mpi4py import MPI
        self.world, self.rank, self.world_size = world, world.rank, world.size
        self._mpi, self._comm = MPI, world.mpi
        self._row_types: dict[int, Any] = {}
        self._staging = Staging()
        # with MPI_THREAD_SERIALIZED, autograd's threads and the main one must not call at the same time
        self._calls: Any = threading.Lock() if MPI.Query_thread() < MPI.THREAD_MULTIPLE else contextlib.nullcontext()

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty(self.world_size, len(counts), dtype=torch.int64)
        sent = counts.to("cpu", torch.int64).contiguous()
        with self.world.meter.waiting():
            with self._calls:
                request = self._comm.Iallgather([self._bytes(sent), self._mpi.BYTE], [self._bytes(gathered), self._mpi.BYTE])
            self._finish(request)
        return gathered

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        assert buffer.is_contiguous() and out.is_contiguous(), "rows are sent as they lie in memory"
        if max(len(buffer), len(out)) > MOST_ROWS:
            raise WorldError(f"rank {self.rank} exchanges {len(buffer):,} and {len(out):,} rows at once and MPI can count "
                             f"{MOST_ROWS:,}; lower train.batch, or raise train.accumulate")
        row_bytes = math.prod(buffer.shape[1:]) * buffer.dtype.itemsize
        sent, received = buffer, out
        if buffer.device.type != "cpu":
            sent, received = self._staging.send(buffer), self._staging.take(out.nbytes)
        row = self._row_type(row_bytes)
        with self.world.meter.waiting(), self._calls:
            request = self._comm.Ialltoallv([self._bytes(sent), send, _starts(send), row],
                                            [self._bytes(received), receive, _starts(receive), row])
        return _MpiPending(self, request, sent, received, out)

    def _finish(self, request: Any) -> None:
        """Wait, without keeping others from the core for long; inside `meter.waiting`."""
        deadline, tests = time.monotonic() + self.world.timeout_s, 0
        while True:
            with self._calls:
                if request.Test():
                    return
            # After every test: where ranks share a core the one that is waited for runs at once. Tests in a row, or naps
            # between them, are up to ten times slower as soon as the machine has anything else to do.
            _yield_core()
            tests += 1
            if tests % CLOCK_EVERY == 0 and time.monotonic() > deadline:
                # in torch's words, by which `moedist.faults` knows that ranks are to be looked for
                raise RuntimeError(f"Timed out waiting {self.world.timeout_s:g} s (world.timeout_s) in an MPI exchange")

    def _bytes(self, tensor: torch.Tensor) -> Any:
        return self._mpi.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)

    def _row_type(self, row_bytes: int) -> Any:
        """A row as one MPI element, so that more than 2 GiB can be sent at once."""
        if row_bytes not in self._row_types:
            self._row_types[row_bytes] = self._mpi.BYTE.Create_contiguous(row_bytes).Commit()
        return self._row_types[row_bytes]


class _MpiPending:
    def __init__(self, transport: MpiTransport, request: Any, sent: torch.Tensor, received: torch.Tensor, out: torch.Tensor):
        self._transport, self._request, self._sent, self._received, self._out = transport, request, sent, received, out

    def wait(self) -> None:
        transport = self._transport
        with transport.world.meter.waiting():
            transport._finish(self._request)
        if self._received is not self._out:
            transport._staging.give(self._sent)
            transport._staging.receive(self._received, self._out)


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _yield_core() -> None:
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)
