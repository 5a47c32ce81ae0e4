"""Let the time inside DeepSpeed's collectives count as waiting, like that inside moedist's own.

The coordinator shares out work by how long each rank computes. ZeRO-2 and 3 reduce and gather within a pass, and there a fast
rank waits for a slow one: unmetered, both would look equally slow.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

from moedist.timing import Meter

COLLECTIVES = ("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
               "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "barrier")


def meter_collectives(meter: Meter) -> None:
    """From now on DeepSpeed's communication in this process is metered by `meter`, and by no other."""
    from deepspeed.comm import comm
    backend = comm.cdb
    for name in COLLECTIVES:
        if hasattr(type(backend), name):
            setattr(backend, name, _metered(functools.partial(getattr(type(backend), name), backend), meter))


def _metered(collective: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with meter.waiting():
            work = collective(*args, **options)
        return _Work(work, meter) if hasattr(work, "wait") else work
    return call


class _Work:
    """The handle of a collective that has been started, whose wait is metered."""

    def __init__(self, work: Any, meter: Meter):
        self._work, self._meter = work, meter

    def wait(self, *args: Any) -> Any:
        with self._meter.waiting():
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
