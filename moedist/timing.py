"""How long this rank computes and waits in a step, and a declared slow-down that lets equal ranks play unequal ones.

Wall time hides stragglers: all ranks leave a collective together, and the slow one has waited least. So the time inside
collectives is taken out, and expert feed-forwards are timed by themselves.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import ContextManager, Iterator, Mapping

import torch

LEAST_SLEEP_S = 2e-4  # a shorter sleep costs more than it lasts; what is owed is carried on
# what a profile tells apart; backward holds the backward part of experts, and of what travels
REGIONS = ("route", "dispatch", "experts", "combine", "dense", "backward", "optimizer")
MOST_CREDIT_S = 0.1  # of time lost to others that later stretches make up for; more, and a rank held up long were not slow


_regions_named = False


def name_regions(named: bool) -> None:
    """Whether `region` gives names to what a profiler sees, on this rank; it takes some microseconds each."""
    global _regions_named
    _regions_named = named


def region(name: str) -> ContextManager:
    """A stretch of a step by its name, one of `REGIONS`, in a profiler's trace."""
    return torch.profiler.record_function(name) if _regions_named else contextlib.nullcontext()


@dataclass
class Traffic:
    """What this rank's rows of one layer did on one kind of link in one step, forward and backward.

    Attributes:
        bytes: sent to other ranks.
        transfer_s: from the start to the end of exchanges; wait_s: of these seconds, those in which the rank stood still.
        rows: sent to experts in the forward pass; pairs: what they would be if a token went to each expert by itself.
        square, square_error: of a sample of the rows that were rounded for the link, and of what rounding did to them.
    """

    bytes: int = 0
    transfer_s: float = 0.0
    wait_s: float = 0.0
    rows: int = 0
    pairs: int = 0
    square: float | torch.Tensor = 0.0
    square_error: float | torch.Tensor = 0.0

    def add(self, nbytes: int, transfer_s: float, wait_s: float | None = None) -> None:
        """An exchange; where nothing is said of waiting, the rank stood still all the time."""
        self.bytes += nbytes
        self.transfer_s += transfer_s
        self.wait_s += transfer_s if wait_s is None else wait_s

    def add_rows(self, rows: int, pairs: int | None = None) -> None:
        """Rows on their way to experts; where nothing is said of pairs, each row is one."""
        self.rows += rows
        self.pairs += rows if pairs is None else pairs


Links = dict[tuple[int, str], Traffic]  # by layer, and "own" (island) or "other" (islands)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of this rank in one step: in the experts of each layer, and computing outside experts and collectives; and
    what travelled."""

    expert_s: dict[int, float]
    dense_s: float
    links: Links = field(default_factory=dict)


class Throttle:
    """Makes this rank compute `slowdown` times slower, by sleeping in proportion to the compute it measures.

    Between two marks it takes the lesser of wall and processor time as compute: on a machine with more ranks than cores
    a rank that had to wait for a core has not computed longer. Then it sleeps until `slowdown` times that has passed; where
    waiting for a core took longer, later stretches sleep less. So ranks that share cores look as if each had its own, as
    long as the sleeping leaves enough cores free: a rank that is not slowed at all has nothing to make up with.

    Args:
        schedule: step -> slow-down from that step on, 1 or more.
        device: on an accelerator its queue is drained first.
    """

    def __init__(self, schedule: Mapping[int, float] | None = None, device: torch.device = torch.device("cpu")):
        self._schedule, self._device = dict(sorted((schedule or {}).items())), device
        self._owed = 0.0
        self.at_step(0)

    def at_step(self, step: int) -> None:
        """Take the slow-down that the schedule has for this step, and start a new stretch of compute."""
        self.slowdown = 1.0
        for first, slowdown in self._schedule.items():
            if first <= step:
                self.slowdown = slowdown
        self.mark()

    def mark(self) -> None:
        """A stretch of compute starts here."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def catch_up(self) -> None:
        """A stretch of compute ends here: sleep what the slow-down asks for, then start the next."""
        if self.slowdown > 1:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            wall = time.perf_counter() - self._wall
            compute = wall if self._device.type != "cpu" else min(wall, time.process_time() - self._cpu)
            self._owed = max(-MOST_CREDIT_S, self._owed + self.slowdown * compute - wall)
            if self._owed > LEAST_SLEEP_S:
                start = time.perf_counter()
                time.sleep(self._owed)
                self._owed -= time.perf_counter() - start  # sleeps are too long: the rest is given back
        self.mark()


class Meter:
    """Times of the current step on this rank. Collectives run inside `waiting`, expert feed-forwards inside `expert`."""

    def __init__(self, throttle: Throttle | None = None, device: torch.device = torch.device("cpu")):
        self.throttle, self._device = throttle or Throttle(device=device), device
        self.begin(0)

    def begin(self, step: int) -> None:
        """A step starts: forget the one before."""
        self._expert_s: defaultdict[int, float] = defaultdict(float)
        self._events: list[tuple[int, torch.Event, torch.Event]] = []
        self._waiting_s = 0.0
        self._links: defaultdict[tuple[int, str], Traffic] = defaultdict(Traffic)
        self.throttle.at_step(step)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective: its time is not this rank's compute."""
        self.throttle.catch_up()
        start = time.perf_counter()
        yield
        self._waiting_s += time.perf_counter() - start
        self.throttle.mark()

    @contextlib.contextmanager
    def expert(self, layer: int) -> Iterator[None]:
        """Around a layer's expert feed-forward, or its gradient. On an accelerator by events, without a sync."""
        self.throttle.catch_up()  # what came before is not the experts'
        if self._device.type == "cpu" or self.throttle.slowdown > 1:
            start = time.perf_counter()
            with region("experts"):
                yield
            self.throttle.catch_up()
            self._expert_s[layer] += time.perf_counter() - start
        else:
            begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            begin.record()
            with region("experts"):
                yield
            end.record()
            self._events.append((layer, begin, end))

    def traffic(self, layer: int, link: str) -> Traffic:
        """To be added to: what travels in this step."""
        return self._links[layer, link]

    def whole(self) -> tuple[float, float]:
        """Seconds since `begin`, and those of them in collectives."""
        return time.perf_counter() - self._start, self._waiting_s

    def take(self) -> StepTimes:
        """The times since `begin`; on an accelerator this waits for its queue."""
        self.throttle.catch_up()
        if self._events:
            self._events[-1][2].synchronize()
            for layer, begin, end in self._events:
                self._expert_s[layer] += begin.elapsed_time(end) / 1e3
            self._events.clear()
        busy = time.perf_counter() - self._start - self._waiting_s
        return StepTimes(dict(self._expert_s), max(0.0, busy - sum(self._expert_s.values())), dict(self._links))
