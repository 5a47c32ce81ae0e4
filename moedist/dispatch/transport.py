"""What moves bytes between ranks: a count exchange and a row exchange, the same for every transport."""

from __future__ import annotations

from typing import Protocol, Sequence

import torch
import torch.distributed as dist

from moedist.world import World


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self) -> None:
        """Return when `out` is filled and `buffer` may be used again. Every rank waits in the order it has started."""


class Transport(Protocol):
    """The two collectives that dispatch needs. Every rank calls both, in the same order, with zero rows too.

    Rows are moved as bytes: any dtype and any trailing shape, the same on every rank.
    """

    rank: int
    world_size: int

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Every rank's 1-D int64 vector, stacked on the CPU: [W, len]. On a GPU this is the one host sync of a layer."""

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        """Begin to send `send[r]` rows of `buffer` to each rank r, in rank order, and to fill `out` with `receive[r]` rows
        of each. Both tensors are contiguous, and stay alive and untouched until `wait`."""

    def exchange(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        """`start`, and wait for it."""
        self.start(buffer, send, receive, out).wait()


class Done:
    """An exchange that moved nothing."""

    def wait(self) -> None:
        pass


class LocalTransport(Transport):
    """A world of one: nothing moves."""

    rank, world_size = 0, 1

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.cpu().unsqueeze(0)

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        assert not len(buffer) and not len(out), "rows for another rank in a world of one"
        return Done()


class TorchDistTransport(Transport):
    """torch.distributed: the native group where all ranks share a vendor, else gloo through host memory."""

    def __init__(self, world: World):
        self.world, self.rank, self.world_size = world, world.rank, world.size

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty(self.world_size, len(counts), dtype=torch.int64)
        counts = counts.cpu()
        with self.world.meter.waiting():
            dist.all_gather(list(gathered), counts, group=self.world.control)
        return gathered

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        native = buffer.device.type != "cpu" and self.world.native is not None
        if native or buffer.device.type == "cpu":
            sent, received = buffer, out
        else:  # ranks of several kinds: bytes through host memory
            sent, received = buffer.cpu(), torch.empty(out.shape, dtype=out.dtype)
        with self.world.meter.waiting():
            work = dist.all_to_all_single(received, sent, list(receive), list(send), async_op=True,
                                          group=self.world.native if native else self.world.control)
        return _TorchDistPending(self.world, work, sent, received, out)


class _TorchDistPending:
    def __init__(self, world: World, work: dist.Work, sent: torch.Tensor, received: torch.Tensor, out: torch.Tensor):
        self._world, self._work, self._sent, self._received, self._out = world, work, sent, received, out

    def wait(self) -> None:
        with self._world.meter.waiting():
            self._work.wait()
        if self._received is not self._out:
            self._out.copy_(self._received)


def build_transport(world: World) -> Transport:
    """The transport that this world has chosen."""
    if world.size == 1:
        return LocalTransport()
    if world.transport == "mpi":
        from moedist.dispatch.mpi_transport import MpiTransport  # needs mpi4py
        return MpiTransport(world)
    return TorchDistTransport(world)
