"""Ranks of several islands: inside one by its native library, between them through host memory, both at once."""

from __future__ import annotations

from typing import Sequence

import torch

from moedist.dispatch.transport import Pending, Transport


class IslandsTransport:
    """Rows to ranks of the own island go by `native`, all others by `outer`.

    Attributes:
        islands: island of every rank.
        members: ranks of the own island, ascending.
        native: a transport over the members, numbered from 0.
        outer: a transport over all ranks, through host memory.
    """

    def __init__(self, islands: Sequence[int], native: Transport, outer: Transport):
        self.rank, self.world_size, self.islands = outer.rank, outer.world_size, tuple(islands)
        self.native, self.outer = native, outer
        self.members = [r for r, island in enumerate(islands) if island == islands[self.rank]]

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return self.outer.all_gather_counts(counts)

    def start(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> Pending:
        if buffer.device.type == "cpu" and getattr(self.native, "accelerated", False):
            return self.outer.start(buffer, send, receive, out)  # the accelerators' library takes no CPU tensors
        sent, received = buffer.split(list(send)), out.split(list(receive))
        outside = [None if r in self.members else r for r in range(self.world_size)]
        return _Both([_start(self.outer, sent, received, outside), _start(self.native, sent, received, self.members)])

    def exchange(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        self.start(buffer, send, receive, out).wait()


class _Both:
    def __init__(self, on_way: Sequence[Pending]):
        self._on_way = on_way

    def wait(self) -> None:
        for pending in self._on_way:
            pending.wait()


class _Scattered:
    """An exchange whose rows are then copied to where they belong."""

    def __init__(self, pending: Pending, buffer: torch.Tensor, parts: Sequence[torch.Tensor]):
        self._pending, self._buffer, self._parts = pending, buffer, parts

    def wait(self) -> None:
        self._pending.wait()
        for part, rows in zip(self._parts, self._buffer.split([len(part) for part in self._parts])):
            part.copy_(rows)


def _start(transport: Transport, sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor],
           ranks: Sequence[int | None]) -> Pending:
    """Exchange rows of some ranks; `ranks` are the transport's, as the world numbers them, None: nothing goes there."""
    send, receive = ([0 if r is None else len(parts[r]) for r in ranks] for parts in (sent, received))
    buffer = torch.cat([sent[r] for r in ranks if r is not None] or [sent[0][:0]])
    out = buffer.new_empty(sum(receive), *buffer.shape[1:])
    parts = [received[r] for r in ranks if r is not None]
    return _Scattered(transport.start(buffer, send, receive, out), out, parts)
