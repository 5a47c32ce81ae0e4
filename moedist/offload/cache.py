"""Pieces of experts on the device, in no more bytes than are given: what is there, what must go, what is on its way."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Iterable, Mapping, Optional

import torch

from moedist.errors import CompressError
from moedist.offload.pieces import PieceId
from moedist.offload.store import Store

POLICIES = ("lru", "score")
DECAY = 0.8  # of scores, each time that their layer has routed


@dataclass
class Moved:
    """What a cache has done.

    Attributes:
        bytes: fetched, those ahead of need included; ahead_bytes: those.
        hits, misses: pieces that were there or on their way when they were wanted, and that were not.
        stall_s: seconds that the computation stood still for pieces.
        peak: most bytes held at once.
    """

    bytes: int = 0
    ahead_bytes: int = 0
    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0
    peak: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


@dataclass
class _Entry:
    """A piece that is here, or is being read; it must stay while it has users."""

    flat: torch.Tensor
    ready: bool = False
    users: int = 0
    used_at: int = 0
    error: Optional[BaseException] = None


class Cache:
    """Fetches pieces from a store, and evicts what was used least recently, or what routers want least.

    Room is made before a piece is read, so that the limit holds while it is on its way. One thread computes and takes pieces,
    another reads ahead.

    Args:
        store: of the pieces; sizes: of every one in bytes.
        limit: bytes.
        policy: lru, or score: the least sum of router weights, older ones counting less.

    Raises:
        CompressError: the limit is below the largest expert with its compensators.
    """

    def __init__(self, store: Store, sizes: Mapping[PieceId, int], limit: int, device: torch.device, policy: str = "lru"):
        largest = max((size + sizes.get(p._replace(compensators=True), 0) for p, size in sizes.items() if not p.compensators),
                      default=0)
        if limit < largest:
            raise CompressError(f"a cache of {limit} bytes does not hold the largest expert, {largest} bytes; set "
                                f"offload.cache_gib={1.001 * largest / 2**30:.3g} or more")
        self.store, self.sizes, self.limit, self.device, self.policy = store, sizes, limit, device, policy
        self.moved, self.used = Moved(), 0
        self._entries: dict[PieceId, _Entry] = {}
        self._scores: dict[tuple[int, int], float] = {}
        self._clock, self._layer = 0, -1
        self._changed = threading.Condition()
        self._ahead: queue.SimpleQueue[Optional[PieceId]] = queue.SimpleQueue()
        self._reader: Optional[threading.Thread] = None

    def __contains__(self, piece: PieceId) -> bool:
        return piece in self._entries

    def take(self, piece: PieceId) -> torch.Tensor:
        """The piece's bytes on the device, read now where they are not there; they stay until `give_back`."""
        start = time.perf_counter()
        with self._changed:
            self._clock, self._layer = self._clock + 1, piece.layer
            here = piece in self._entries
            self.moved.hits, self.moved.misses = self.moved.hits + here, self.moved.misses + (not here)
            while piece not in self._entries and not self._make_room(self.sizes[piece], ()):
                self._changed.wait()  # what is being read ahead can be evicted only once it is there
            to_read = piece not in self._entries
            entry = self._begin(piece) if to_read else self._entries[piece]
            entry.users, entry.used_at = entry.users + 1, self._clock
            waits = not entry.ready
        if to_read:
            self._read(piece, entry, ahead=False)
        elif waits:
            with self._changed:
                while not entry.ready:
                    self._changed.wait()
            if entry.error is not None:
                raise CompressError(f"{piece} could not be read: {entry.error}") from entry.error
        if waits:
            self.moved.stall_s += time.perf_counter() - start
        return entry.flat

    def give_back(self, piece: PieceId) -> None:
        """It may be evicted again."""
        with self._changed:
            self._entries[piece].users -= 1
            self._changed.notify_all()

    def read_ahead(self, pieces: Iterable[PieceId]) -> None:
        """Read pieces in the background, as far as there is room that neither their layer nor the present one uses."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_queue, daemon=True, name="experts-ahead")
            self._reader.start()
        for piece in pieces:
            self._ahead.put(piece)

    def routed(self, layer: int, weights: Mapping[int, float]) -> None:
        """Router weights, summed by expert, that a layer has just given."""
        with self._changed:
            for key in [key for key in self._scores if key[0] == layer]:
                self._scores[key] *= DECAY
            for e, weight in weights.items():
                self._scores[layer, e] = self._scores.get((layer, e), 0.0) + weight

    def close(self) -> None:
        """End the reading ahead."""
        if self._reader is not None:
            self._ahead.put(None)
            self._reader.join()
            self._reader = None

    def _read_queue(self) -> None:
        while (piece := self._ahead.get()) is not None:
            with self._changed:
                if piece in self._entries or not self._make_room(self.sizes[piece], (self._layer, piece.layer)):
                    continue
                entry = self._begin(piece)
                entry.used_at = self._clock
            try:
                self._read(piece, entry, ahead=True)
            except Exception:  # the computation reads it again, and meets the error itself
                continue

    def _read(self, piece: PieceId, entry: _Entry, ahead: bool) -> None:
        try:
            self.store.read(piece, entry.flat)
        except BaseException as error:
            with self._changed:
                self._forget(piece)
                entry.ready, entry.error = True, error
                self._changed.notify_all()
            raise
        with self._changed:
            entry.ready = True
            self.moved.bytes += self.sizes[piece]
            self.moved.ahead_bytes += self.sizes[piece] if ahead else 0
            self._changed.notify_all()

    def _begin(self, piece: PieceId) -> _Entry:
        self.used += self.sizes[piece]
        assert self.used <= self.limit, f"{self.used} bytes in a cache of {self.limit}"
        self.moved.peak = max(self.moved.peak, self.used)
        entry = self._entries[piece] = _Entry(torch.empty(self.sizes[piece], dtype=torch.uint8, device=self.device))
        return entry

    def _forget(self, piece: PieceId) -> None:
        self.used -= self.sizes[piece]
        del self._entries[piece]

    def _make_room(self, size: int, spared: tuple[int, ...]) -> bool:
        """Evict until `size` more bytes fit, nothing of `spared` layers; False, and nothing evicted, where they cannot."""
        free_to_go = (p for p, entry in self._entries.items() if entry.ready and not entry.users and p.layer not in spared)
        victims = sorted(free_to_go, key=self._worth)
        chosen, free = [], self.limit - self.used
        for piece in victims:
            if free >= size:
                break
            chosen.append(piece)
            free += self.sizes[piece]
        if free < size:
            return False
        for piece in chosen:
            self._forget(piece)
        return True

    def _worth(self, piece: PieceId) -> tuple[float, int]:
        score = self._scores.get((piece.layer, piece.expert), 0.0) if self.policy == "score" else 0.0
        return score, self._entries[piece].used_at
