"""Pinned host memory through which an accelerator's rows travel: grown as needed, and used again."""

from __future__ import annotations

import threading
from typing import Any, Optional

import torch

LEAST_BYTES = 1 << 16


class Staging:
    """Host buffers of this rank. Several exchanges may be under way, each with buffers of its own.

    Copies run on the accelerator's current stream. A buffer that is still being copied to the accelerator is not used again
    before that is done.
    """

    def __init__(self) -> None:
        self._free: list[tuple[torch.Tensor, Optional[Any]]] = []  # a whole buffer, and the copy that last read it
        self._whole: dict[int, torch.Tensor] = {}  # address -> the whole buffer of one in use
        self._changing = threading.Lock()

    @property
    def buffers(self) -> list[int]:
        """Bytes of every buffer, in use or free."""
        return sorted(len(b) for b in [*self._whole.values(), *(b for b, _ in self._free)])

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of host memory, the caller's until it is given back.

        The smallest free buffer that is large enough; where none is, the largest one is replaced by one of at least the
        bytes, in powers of two, so that there are no more buffers than exchanges at once have needed.
        """
        with self._changing:
            self._free.sort(key=lambda entry: len(entry[0]))
            fits = next((i for i, (b, _) in enumerate(self._free) if len(b) >= nbytes), None)
            buffer, copied = self._free.pop(-1 if fits is None else fits) if self._free else (None, None)
            if copied is not None:
                copied.synchronize()
            if buffer is None or len(buffer) < nbytes:
                size = max(LEAST_BYTES, 1 << max(nbytes - 1, 0).bit_length())
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=torch.accelerator.is_available())
            self._whole[_address(buffer)] = buffer
        return buffer[:nbytes]

    def give(self, part: torch.Tensor, copied: Optional[Any] = None) -> None:
        """The buffer that `part` is the beginning of is free, once the event `copied` has happened."""
        with self._changing:
            self._free.append((self._whole.pop(_address(part)), copied))

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """The bytes of an accelerator's rows in host memory, there when this returns."""
        part = self.take(rows.nbytes)
        part.copy_(_as_bytes(rows), non_blocking=True)
        event = torch.Event(rows.device)
        event.record()
        event.synchronize()  # MPI reads from the host and knows of no streams
        return part

    def receive(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Copy received bytes to an accelerator's rows, in stream order, and give the buffer back."""
        _as_bytes(out).copy_(part, non_blocking=True)
        event = torch.Event(out.device)
        event.record()
        self.give(part, event)


def _address(part: torch.Tensor) -> int:
    return part.untyped_storage().data_ptr()  # an empty part has no address of its own


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten().view(torch.uint8)
