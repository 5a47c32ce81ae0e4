"""Measure every rank: experts, the rest of the model, links and memory, before anything is placed.

All ranks measure at the same time, since in training they share caches, cores and links too, and in rounds over some
seconds: a burst of measurements on a busy machine is off by half, the median of rounds is not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable, Sequence

import torch

from moedist.config import Config
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.probe_fit import Line, fit_line, sample_sizes, spread_of
from moedist.coordinator.probe_links import measure_exchange, measure_host_copy
from moedist.coordinator.probe_machine import Memory, device_memory, device_name, host_name
from moedist.coordinator.probe_table import ranks_text
from moedist.coordinator.probe_work import Sample, Work, compute_dtype, dense_work, expert_work
from moedist.coordinator.sizes import Sizes
from moedist.dispatch import Transport
from moedist.world import World, return_freed_memory

ROUNDS = 5  # fewer are poor: a single long round is worth less than several short ones
MOST_ROUNDS = 100
GOAL_ROUNDS = 8  # amounts are chosen so that about so many fit in the time
LEAST_SCALE = 1 / 8  # of the amounts that a rank would get; smaller ones say little about them
MEMORY_PART = 0.25  # of what is free, that a measurement may take
NOISY = 0.2  # a spread above it is worth another series
POOR_FIT = 0.15


@dataclass
class _Series:
    """One rank's times of one kind of work: a row for every round, an entry for every amount."""

    samples: list[Sample]
    rounds: list[list[float]] = field(default_factory=list)

    def run(self) -> list[float]:
        return [sample.seconds() for sample in self.samples]

    def line(self) -> Line:
        return fit_line([s.amount for s in self.samples], [statistics.median(t) for t in zip(*self.rounds)])

    def spread(self) -> float:
        return spread_of([sum(times) for times in self.rounds])


@dataclass(frozen=True)
class _Speed:
    """A fitted speed with the spread of its rounds."""

    line: Line
    spread: float = 0.0

    @classmethod
    def given(cls, per_s: float) -> "_Speed":
        return cls(Line(0.0, per_s, 0.0))


def probe(world: World, config: Config, vocab: int, transport: Transport,
          say: Callable[[str], None] = lambda text: None) -> list[RankFacts]:
    """Facts of every rank, on every rank, in rank order. Collective; takes about `placement.probe_s` seconds,
    twice that where the machine is busy.

    Speeds that the configuration gives are taken as they are. The random state and the memory stay as they were.

    Args:
        vocab: size of the vocabulary.
        say: is told, on every rank, what people should know of the measurement.
    """
    memory = _memory(world)  # before anything large is allocated
    p = config.placement
    given = {"expert": p.speeds, "dense": p.speeds if p.dense_speeds is None else p.dense_speeds}
    speeds = {name: _Speed.given(values[world.rank]) for name, values in given.items() if values is not None}
    devices = [] if world.device.type == "cpu" else [world.device]
    with torch.random.fork_rng(devices, device_type=world.device.type if devices else "cuda"):
        torch.manual_seed(0)
        speeds |= _measure(world, config, vocab, [name for name in given if name not in speeds], memory, say)
    bytes_per_s, latency_s = measure_exchange(world, transport, config.model.width, compute_dtype(config))
    expert, dense = speeds["expert"], speeds["dense"]
    mine = RankFacts(
        rank=world.rank, host=host_name(), device=str(world.device), vendor=world.vendor,
        device_name=device_name(world.device), island=world.islands[world.rank],
        expert_call_s=expert.line.call_s, expert_rows_per_s=expert.line.per_s, expert_spread=expert.spread,
        dense_call_s=dense.line.call_s, dense_tokens_per_s=dense.line.per_s, dense_spread=dense.spread,
        alltoall_bytes_per_s=bytes_per_s, alltoall_latency_s=latency_s,
        host_copy_bytes_per_s=measure_host_copy(world.device), free_bytes=memory.free, total_bytes=memory.total,
        measured=all(values is None for values in given.values()))
    _return_memory(world)
    return world.gather_objects(mine)


def _memory(world: World) -> Memory:
    """This rank's part of its device's memory."""
    mine = (host_name(), str(world.device))
    sharing = world.gather_objects(mine).count(mine)
    memory = device_memory(world.device)
    return Memory(memory.free // sharing, memory.total // sharing)


def _measure(world: World, config: Config, vocab: int, wanted: Sequence[str], memory: Memory,
             say: Callable[[str], None]) -> dict[str, _Speed]:
    """This rank's speed in each kind of work. Every rank must call it, with the same `wanted`."""
    if not wanted:
        return {}
    sizes, budget = Sizes.of(config, vocab), config.placement.probe_s
    series = {}
    for name in wanted:
        work = expert_work(config, sizes, world) if name == "expert" else dense_work(config, sizes, vocab, world)
        series[name] = _prepare(work, world.size, budget / GOAL_ROUNDS / len(wanted), memory.free)
    start = time.perf_counter()
    for one in series.values():
        one.run()  # warms up, at full size
    slowest = max(world.gather_objects(time.perf_counter() - start))
    rounds = min(MOST_ROUNDS, max(2, int(budget / slowest)))
    if rounds < ROUNDS:
        say(f"probe: one round of measurements takes {slowest:.1f} s, so there are {rounds} only; raise placement.probe_s "
            f"(now {budget:g}) to {math.ceil(ROUNDS * slowest)} for better ones")
    _run_rounds(world, series, rounds)
    if any(_noisy(world, series)):
        _run_rounds(world, series, rounds)
    noisy = _noisy(world, series)
    errors = world.gather_objects(max(one.line().error for one in series.values()))
    spreads = [max((s for r, (_, s) in noisy if r == rank), default=0.0) for rank in range(world.size)]
    doubted = [r for r in range(world.size) if spreads[r] or errors[r] > POOR_FIT]
    if doubted:
        say(f"probe: {ranks_text(doubted)} of {world.size} measured with doubts, the plan is as uncertain: times of the same "
            f"work spread by up to {100 * max(spreads):.0f} %, and are up to {100 * max(errors):.0f} % off a straight line over "
            "amounts of work; is the machine busy? More rounds (placement.probe_s) or speeds that you give (placement.speeds) "
            "help, and measuring goes on while training does")
    return {name: _Speed(one.line(), one.spread()) for name, one in series.items()}


def _prepare(work: Work, ranks: int, allowed_s: float, free_bytes: int) -> _Series:
    """Measurements of amounts around what a rank gets, or of less where a round of them would take longer than allowed.

    A slow rank ends up with less, as it does when work is planned.
    """
    top = min(2.0, ranks)  # a fast rank gets more than its equal share, if there are others
    scales = [top / 8, top / 2, top]  # far apart, to tell call from speed
    tried = [work.sample(n) for n in sample_sizes(work.share * LEAST_SCALE, [scales[0], 4 * scales[0]], work.unit)]
    for sample in tried:
        sample.seconds()  # warms up
    line = fit_line([s.amount for s in tried], [min(s.seconds() for _ in range(2)) for s in tried])
    fits = MEMORY_PART * free_bytes / (work.unit_bytes * work.share * top)
    in_time = (allowed_s - len(scales) * line.call_s) * line.per_s / (work.share * sum(scales))
    seen = line.call_s * line.per_s / (work.share * top)  # with less, all would be call, and nothing be learnt of the speed
    scale = min(1.0, fits, max(LEAST_SCALE, in_time, seen))
    return _Series([work.sample(n) for n in sample_sizes(work.share * scale, scales, work.unit)])


def _run_rounds(world: World, series: dict[str, _Series], rounds: int) -> None:
    for _ in range(rounds):
        world.barrier()
        for one in series.values():
            one.rounds.append(one.run())


def _noisy(world: World, series: dict[str, _Series]) -> list[tuple[int, tuple[str, float]]]:
    """(rank, (kind of work, spread)) of all whose rounds spread too far; the same on every rank."""
    spreads = world.gather_objects([(name, one.spread()) for name, one in series.items()])
    return [(rank, pair) for rank, pairs in enumerate(spreads) for pair in pairs if pair[1] > NOISY]


def _return_memory(world: World) -> None:
    gc.collect()
    if world.device.type == "cpu":
        return_freed_memory()
    elif empty_cache := getattr(torch.get_device_module(world.device), "empty_cache", None):
        empty_cache()
