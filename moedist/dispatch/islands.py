"""Ranks of several islands: inside one by its native library, between them through host memory, both at once."""

from __future__ import annotations

from typing import Optional, Sequence

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
        sent, received = _Rows(buffer, send), _Rows(out, receive)
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


class _Rows:
    """A buffer of rows of all ranks, one rank's after another."""

    def __init__(self, buffer: torch.Tensor, lengths: Sequence[int]):
        self.buffer, self.lengths = buffer, lengths
        self.parts = buffer.split(list(lengths))

    def whole(self, ranks: Sequence[int]) -> Optional[torch.Tensor]:
        """The rows of these ranks (ascending) as a part of the buffer; None where those of others are between."""
        with_rows = [r for r in ranks if self.lengths[r]]
        if not with_rows:
            return self.buffer[:0]
        span = range(with_rows[0], with_rows[-1] + 1)
        if any(self.lengths[r] for r in span if r not in with_rows):
            return None
        start = sum(self.lengths[:span.start])
        return self.buffer[start:start + sum(self.lengths[r] for r in span)]


class _Scattered:
    """An exchange whose rows are then copied to where they belong."""

    def __init__(self, pending: Pending, buffer: torch.Tensor, parts: Sequence[torch.Tensor]):
        self._pending, self._buffer, self._parts = pending, buffer, parts

    def wait(self) -> None:
        self._pending.wait()
        for part, rows in zip(self._parts, self._buffer.split([len(part) for part in self._parts])):
            part.copy_(rows)


def _start(transport: Transport, sent: _Rows, received: _Rows, ranks: Sequence[int | None]) -> Pending:
    """Exchange rows of some ranks; `ranks` are the transport's, as the world numbers them, None: nothing goes there."""
    send, receive = ([0 if r is None else rows.lengths[r] for r in ranks] for rows in (sent, received))
    there = [r for r in ranks if r is not None]
    buffer, out = sent.whole(there), received.whole(there)
    if buffer is None:
        buffer = torch.cat([sent.parts[r] for r in there])
    if out is not None:
        return transport.start(buffer, send, receive, out)
    out = received.buffer.new_empty(sum(receive), *received.buffer.shape[1:])
    return _Scattered(transport.start(buffer, send, receive, out), out, [received.parts[r] for r in there])
