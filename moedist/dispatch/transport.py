"""What moves bytes between ranks: a count exchange and a row exchange, the same for every transport."""

from __future__ import annotations

from typing import Any, Protocol, Sequence

import torch
import torch.distributed as dist

from moedist.timing import Meter
from moedist.world import World


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self) -> None:
        """Return when `out` is filled and `buffer` may be used again. Every rank waits in the order it has started."""


class Transport(Protocol):
    """The collectives that dispatch needs. Every rank calls them, in the same order, with zero rows too.

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
    """A world of one: rows stay."""

    rank, world_size = 0, 1

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.cpu().unsqueeze(0)

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        assert len(buffer) == len(out), "rows for another rank in a world of one"
        out.copy_(buffer)
        return Done()


class GroupTransport(Transport):
    """The ranks of a torch.distributed group.


    Args:
        group: the process group.
        meter: is told of waiting.
        accelerated: the group is of the accelerators' own library, which CPU tensors cannot use: they go over `control`.
        control: a gloo group of the same ranks, for counts; None: they go over `group`.
    """

    def __init__(self, group: Any, meter: Meter, accelerated: bool = False, control: Any = None):
        self.group, self.meter, self.accelerated, self.control = group, meter, accelerated, control or group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        on_device = self.accelerated and self.control is self.group
        counts = counts if on_device else counts.cpu()
        gathered = counts.new_empty(self.world_size, len(counts))
        with self.meter.waiting():
            dist.all_gather(list(gathered), counts, group=self.control)
        return gathered.cpu()

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        on_cpu = buffer.device.type == "cpu"
        if on_cpu or self.accelerated:
            sent, received = buffer, out
        else:  # ranks of several kinds: bytes through host memory
            sent, received = buffer.cpu(), torch.empty(out.shape, dtype=out.dtype)
        with self.meter.waiting():
            work = dist.all_to_all_single(received, sent, list(receive), list(send), async_op=True,
                                          group=self.control if on_cpu else self.group)
        return _Work(work, self.meter, sent, received, out)


class _Work:
    """A collective of torch.distributed, with what it reads and writes."""

    def __init__(self, work: Any, meter: Meter, sent: torch.Tensor, received: torch.Tensor, out: torch.Tensor):
        self._work, self._meter, self._sent, self._received, self._out = work, meter, sent, received, out

    def wait(self) -> None:
        with self._meter.waiting():
            self._work.wait()
        if self._received is not self._out:
            self._out.copy_(self._received)


class TorchDistTransport(GroupTransport):
    """torch.distributed over all ranks: the native group where they share a vendor, else gloo through host memory."""

    def __init__(self, world: World):
        native = world.native is not None
        super().__init__(world.native if native else world.control, world.meter, native, world.control)
