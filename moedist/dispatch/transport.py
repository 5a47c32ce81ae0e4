"""What moves bytes between ranks: a count exchange and a row exchange, the same for every transport."""

from __future__ import annotations

from typing import Protocol, Sequence

import torch
import torch.distributed as dist

from moedist.world import World


class Transport(Protocol):
    """The two collectives that dispatch needs. Every rank calls both, in the same order, with zero rows too."""

    rank: int
    world_size: int

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Every rank's 1-D int64 vector, stacked on the CPU: [W, len]. On a GPU this is the one host sync of a layer."""

    def exchange(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        """Send `send[r]` rows of `buffer` to each rank r, in rank order, and fill `out` with `receive[r]` rows of each."""


class LocalTransport:
    """A world of one: nothing moves."""

    rank, world_size = 0, 1

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.cpu().unsqueeze(0)

    def exchange(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        assert not len(buffer) and not len(out), "rows for another rank in a world of one"


class TorchDistTransport:
    """torch.distributed: the native group where all ranks share a vendor, else gloo through host memory."""

    def __init__(self, world: World):
        self.world, self.rank, self.world_size = world, world.rank, world.size

    def all_gather_counts(self, counts: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty(self.world_size, len(counts), dtype=torch.int64)
        counts = counts.cpu()
        with self.world.meter.waiting():
            dist.all_gather(list(gathered), counts, group=self.world.control)
        return gathered

    def exchange(self, buffer: torch.Tensor, send: Sequence[int], receive: Sequence[int], out: torch.Tensor) -> None:
        native = buffer.device.type != "cpu" and self.world.native is not None
        if native or buffer.device.type == "cpu":
            sent, received = buffer, out
        else:  # ranks of several kinds: bytes through host memory
            sent, received = buffer.cpu(), torch.empty(out.shape, dtype=out.dtype)
        with self.world.meter.waiting():
            dist.all_to_all_single(received, sent, list(receive), list(send),
                                   group=self.world.native if native else self.world.control)
        if received is not out:
            out.copy_(received)


def build_transport(world: World) -> Transport:
    """The transport for this world."""
    return LocalTransport() if world.size == 1 else TorchDistTransport(world)
