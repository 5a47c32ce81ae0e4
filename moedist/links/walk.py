"""Send known bytes over links, one direction of one link at a time, then all to all; say where rows do not arrive.

Exchanges run in a thread, since one that waits for ever can only be left behind. What ranks have seen then goes over the
store that they met at, not over the links that are in doubt.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Optional, Sequence

import torch
import torch.distributed as dist

from moedist.dispatch import Transport
from moedist.errors import WorldError
from moedist.links.facts import WAYS, LinkFacts, Wrong, stuck_text
from moedist.links.pairs import Pair
from moedist.links.pattern import DTYPES, WORD, pattern, wrong_bytes
from moedist.liveness import Peer
from moedist.world import World

SMALL = 512  # bytes that fit into any packet
LATE_S = 5.0  # that ranks may be apart by
PATIENCE_S = 15.0  # without an exchange that ends; much more than a busy machine keeps a rank from its core
_tests = itertools.count()  # of this process, and so the same on all ranks: tests are collective


@dataclass(frozen=True)
class Depth:
    """How thoroughly links are tested.

    Attributes:
        sizes: bytes of an exchange, ascending -> exchanges in a row that are timed together; 0: only checked.
        rounds: of timing, both directions in turn.
        dtypes: that are tried on every link; between all ranks at once, all are.
        together: bytes that a rank sends in the exchanges between all ranks, one for each dtype.
    """

    sizes: dict[int, int]
    rounds: int
    dtypes: tuple[torch.dtype, ...] = (torch.uint8,)
    together: int = 2**16


@dataclass(frozen=True)
class Step:
    """From `source` to `target`, or from every rank to every other (None). `times` is 0 where it is checked, not timed."""

    source: Optional[int]
    target: Optional[int]
    nbytes: int
    dtype: torch.dtype
    times: int = 0


def steps_of(pairs: Sequence[Pair], depth: Depth) -> list[Step]:
    """All that is sent, in this order on every rank."""
    steps = []
    for a, b in pairs:
        ways = [(a, b), (b, a)]
        for nbytes, times in depth.sizes.items():
            dtypes = [dtype for dtype in depth.dtypes if not times or dtype != torch.uint8]  # what is timed is checked too
            steps += [Step(s, t, nbytes, dtype) for dtype in dtypes for s, t in ways]
            steps += [Step(s, t, nbytes, torch.uint8, times) for _ in range(depth.rounds if times else 0) for s, t in ways]
    return steps + [Step(None, None, depth.together, dtype) for dtype in DTYPES]


def measure_links(world: World, transport: Transport, pairs: Sequence[Pair], depth: Depth,
                  patience_s: float = PATIENCE_S) -> list[LinkFacts]:
    """What was seen of both directions of the links of `pairs`, and of any other on which bytes changed; the same on every
    rank. Collective.

    Raises:
        WorldError: rows do not arrive; the same on every rank. The process cannot use the transport any more.
    """
    peers = world.gather_objects(Peer.here().host)
    names = [f"rank {r} on {host} (island {island})" for r, (host, island) in enumerate(zip(peers, world.island_names))]
    steps = steps_of(pairs, depth)
    walk = _Walk(world, transport, steps, names)
    if found := _agree(world, walk.run(patience_s), patience_s):
        raise WorldError(_stuck_text(steps, names, found))
    by_ranks = {(f.source, f.target): f for of_rank in world.gather_objects(list(walk.facts.values())) for f in of_rank}
    order = [way for a, b in pairs for way in ((a, b), (b, a))]
    return [by_ranks.pop(way) for way in order] + [f for f in by_ranks.values() if f.wrong]


class _Walk:
    """This rank's way through all steps."""

    def __init__(self, world: World, transport: Transport, steps: Sequence[Step], names: Sequence[str]):
        self.world, self.transport, self.steps, self.names = world, transport, steps, names
        self.facts: dict[Pair, LinkFacts] = {}
        self._at, self.moved = 0, time.monotonic()
        self._error: Optional[Exception] = None
        self._ended = threading.Event()

    def run(self, patience_s: float) -> Optional["_Stuck"]:
        """Where this rank did not get further; None where it has done all."""
        threading.Thread(target=self._all, daemon=True, name="links").start()
        while not self._ended.wait(max(0.0, self.moved + patience_s - time.monotonic())):
            if time.monotonic() > self.moved + patience_s:
                return _Stuck(self._at, f"within {patience_s:g} s")
        if self._error is None or isinstance(self._error, RuntimeError):
            return None if self._error is None else _Stuck(self._at, _in_short(self._error), self._error)
        raise self._error

    def _all(self) -> None:
        try:
            if self.world.device.type != "cpu":
                torch.accelerator.set_device_index(self.world.device.index or 0)  # each thread has its own
            for self._at, step in enumerate(self.steps):
                self._do(step)
        except Exception as error:
            self._error = error
        self._ended.set()

    def _do(self, step: Step) -> None:
        """Exchange, and compare with what was sent; where it is timed, some in a row, from the moment that both ends are
        there, as the target sees them."""
        me, size = self.world.rank, self.world.size
        if step.source is None:
            nbytes = max(WORD, step.nbytes // (size - 1) // WORD * WORD)
            sent, wanted = ({r: pattern(*way(r), nbytes, step.dtype) for r in range(size) if r != me}
                            for way in (lambda r: (me, r), lambda r: (r, me)))
        else:
            ends = (step.source, step.target)
            known = pattern(*ends, step.nbytes, step.dtype) if me in ends else None
            sent, wanted = ({other: known} if me == end else {} for end, other in (ends, ends[::-1]))
        exchange = self._prepare(step.dtype, *({r: t.nbytes for r, t in of.items()} for of in (sent, wanted)))
        if sent:
            exchange.buffer.copy_(torch.cat(list(sent.values())))
        if step.times:
            self._prepare(torch.uint8, *2 * [{sum(ends) - me: WORD} if me in ends else {}]).run()
        start = time.perf_counter()
        for _ in range(step.times or 1):
            exchange.run()
        seconds = (time.perf_counter() - start) / (step.times or 1)
        for source, arrived in zip(wanted, exchange.out.split([len(t) for t in wanted.values()])):
            facts, (count, first) = self._of(source), wrong_bytes(arrived, wanted[source])
            facts.checked += arrived.nbytes
            if step.times:
                facts.seconds.setdefault(step.nbytes, []).append(seconds)
            if count:
                facts.wrong.append(Wrong(str(step.dtype).removeprefix("torch."), arrived.nbytes, count, first))

    def _of(self, source: int) -> LinkFacts:
        rank = self.world.rank
        return self.facts.setdefault((source, rank), LinkFacts(source, rank, self.names[source], self.names[rank]))

    def _prepare(self, dtype: torch.dtype, send: dict[int, int], receive: dict[int, int]) -> "_Exchange":
        """Of so many bytes to and from some ranks."""
        counts = [[of.get(r, 0) // dtype.itemsize for r in range(self.world.size)] for of in (send, receive)]
        buffer, out = (torch.zeros(sum(n), dtype=dtype, device=self.world.device) for n in counts)
        return _Exchange(self, buffer, out, *counts)


@dataclass(frozen=True)
class _Exchange:
    walk: _Walk
    buffer: torch.Tensor
    out: torch.Tensor
    send: list[int]
    receive: list[int]

    def run(self) -> None:
        self.walk.transport.exchange(self.buffer, self.send, self.receive, out=self.out)
        if self.out.device.type != "cpu":
            torch.accelerator.synchronize(self.out.device)
        self.walk.moved = time.monotonic()


@dataclass(frozen=True)
class _Stuck:
    """In step number `step`, and why; `error` where a collective failed."""

    step: int
    why: str
    error: Optional[RuntimeError] = None


def _in_short(error: RuntimeError) -> str:
    """Without the source file that gloo begins with, and its advice."""
    return re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).split(". ")[0]


def _agree(world: World, stuck: Optional[_Stuck], patience_s: float) -> dict[int, _Stuck]:
    """Where ranks are stuck, by rank, the same on every rank; over the store, which does not need the links.

    Raises:
        RuntimeError: this rank's collective failed, and another rank says nothing: it may be dead.
    """
    store = dist.PrefixStore(f"links/{next(_tests)}", world.store)
    if stuck is not None:
        store.set(f"stuck/{world.rank}", json.dumps([stuck.step, stuck.why]))
    store.set(f"here/{world.rank}", "")
    if store.add("count", 1) == world.size:
        store.set("all", "")
    try:
        store.wait(["all"], timedelta(seconds=patience_s + LATE_S))
    except RuntimeError as error:
        if stuck is not None and stuck.error is not None:
            raise stuck.error
        silent = [r for r in range(world.size) if not store.check([f"here/{r}"])]
        raise WorldError(f"{'ranks' if len(silent) > 1 else 'rank'} {', '.join(map(str, silent))} did not come through the "
                         f"test of links, nor say why, within {patience_s + LATE_S:g} s; {WAYS}") from error
    return {r: _Stuck(*json.loads(store.get(f"stuck/{r}"))) for r in range(world.size) if store.check([f"stuck/{r}"])}


def _stuck_text(steps: Sequence[Step], names: Sequence[str], found: dict[int, _Stuck]) -> str:
    """Whoever is stuck at the earliest step is so by the fault; others wait for them."""
    at = min(stuck.step for stuck in found.values())
    ranks, step = [r for r, stuck in found.items() if stuck.step == at], steps[at]
    why = found[ranks[0]].why
    if step.source is None or not set(ranks) <= {step.source, step.target}:
        who = " and ".join(names[r] for r in ranks)
        return (f"rows between all ranks did not come through at {who} ({why})"
                f"{': look at the link between them' if len(ranks) == 2 else ''}; {WAYS}")
    done = [s.nbytes for s in steps[:at] if (s.source, s.target) == (step.source, step.target) and s.nbytes < step.nbytes]
    return stuck_text(names[step.source], names[step.target], step.nbytes, max(done, default=0), why)
