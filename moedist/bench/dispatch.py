"""`moedist bench dispatch`: rows by MPI, gloo and over islands, as dispatch sends them, on ranks of this machine or a job.

All carry the same rows through the same interface, in turn within one run, and what arrives is compared with what was sent
before and after the timing. A round is some exchanges in a row, each timed by itself: on a machine with other work, most of
them then pass undisturbed, whichever of the ways is timed. An exchange lasts as long as on its slowest rank. Islands are the
two halves of the ranks, gloo inside and MPI between. What sharing rows between islands saves is then counted, and a training
over a slow link measured (`slow_link`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Sequence

import torch

from moedist.bench.dedup_count import Saved, measure_saved
from moedist.bench.figures import read_figures, write_figures
from moedist.bench.slow_link import bench_slow_link
from moedist.bench.split_islands import split_in_two
from moedist.config import WorldConfig
from moedist.dispatch import TorchDistTransport, Transport, build_transport
from moedist.errors import MoedistError
from moedist.mpi import mpirun
from moedist.rendezvous.launch import find_launch
from moedist.text_table import table
from moedist.world import World

SIZES = {"4KiB": 2**12, "64KiB": 2**16, "1MiB": 2**20, "16MiB": 2**24}  # that a rank sends, over all others
IN_A_ROW = {"4KiB": 200, "64KiB": 200, "1MiB": 30, "16MiB": 3}  # so long that the system has put every rank on a core
ROW = 16  # int32
WARMUP = 3
DEDUP_K = (2, 8)


class Payload:
    """What every rank sends to every other: nearly equal parts, each with numbers of its own."""

    def __init__(self, world: World, nbytes: int):
        rows, others = nbytes // (4 * ROW), world.size - 1
        self._rank = world.rank
        self.send = [self._part(rows, others, world.rank, r) for r in range(world.size)]
        self.receive = [self._part(rows, others, r, world.rank) for r in range(world.size)]
        self.sent = torch.cat([self._rows(world.rank, r, n) for r, n in enumerate(self.send)])
        self.wanted = torch.cat([self._rows(r, world.rank, n) for r, n in enumerate(self.receive)])
        self.out = torch.empty_like(self.wanted)

    @staticmethod
    def _part(rows: int, others: int, source: int, target: int) -> int:
        if source == target:
            return 0
        place = target - (target > source)
        return rows // others + (place < rows % others)

    @staticmethod
    def _rows(source: int, target: int, count: int) -> torch.Tensor:
        return (torch.arange(count * ROW, dtype=torch.int32) * 31 + 1009 * source + 9176 * target).view(count, ROW)

    def exchange(self, transport: Transport) -> None:
        transport.exchange(self.sent, self.send, self.receive, out=self.out)

    def check(self, name: str, transport: Transport) -> None:
        """Raise `MoedistError` where other rows arrive than were sent."""
        self.out.fill_(-1)
        self.exchange(transport)
        if not torch.equal(self.out, self.wanted):
            raise MoedistError(f"{name} brought rank {self._rank} other rows than were sent to it")


def bench_dispatch(ranks: Sequence[int], rounds: int, steps: int, json_path: str | None) -> dict[str, float]:
    """Measure and print; starts mpirun on this machine for each of `ranks`, unless it runs under a launcher.

    Args:
        steps: of each training over a slow link, which is not done under a launcher; 0: it is not done.

    Returns:
        `dispatch.mpi_over_gloo.{size}` and `dispatch.islands_over_gloo.{size}` (speed) on two ranks, with `.rN` before the
        size on N; microseconds of all; `dispatch.dedup.kK.saved_fraction` of the bytes between islands; those of
        `bench_slow_link`.

    Raises:
        MoedistError: no mpirun, ranks failed, or wrong rows arrived.
    """
    if find_launch().size == 1:
        figures = {name: value for n in ranks for name, value in _start_ranks(n, rounds).items()}
        if steps:
            figures |= bench_slow_link(steps, None)
        write_figures(figures, json_path)
        return figures
    with World.start(WorldConfig(device="cpu", transport="mpi")) as world:
        sides = {"gloo": TorchDistTransport(world), "mpi": build_transport(world), "islands": split_in_two(world)}
        seconds = _measure(world, sides, rounds)
        saved = [measure_saved(world, sides["islands"], top_k) for top_k in DEDUP_K]
        figures = _figures(world.size, seconds, saved)
        if world.is_main:
            _show(world.size, seconds, saved, rounds)
            for name, value in figures.items():
                print(f"  {name} {value:.3g}")
            write_figures(figures, json_path)
        return figures


def _start_ranks(ranks: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        done = subprocess.run([*mpirun(ranks), sys.executable, "-m", "moedist", "bench", "dispatch", "--rounds", str(rounds),
                               "--json", str(path)], check=False, env={"OMP_NUM_THREADS": "1", **os.environ})
        if done.returncode:
            raise MoedistError(f"mpirun's {ranks} ranks ended with exit code {done.returncode}; what they said stands above")
        return read_figures(str(path))


def _measure(world: World, sides: dict[str, Transport], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of one exchange by size and side."""
    found = {}
    for size, nbytes in SIZES.items():
        payload = Payload(world, nbytes)
        mine: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(WARMUP + rounds):
            shift = i % len(sides)
            for name in [*sides][shift:] + [*sides][:shift]:  # no one always runs after the same neighbour
                if i == 0:
                    payload.check(name, sides[name])
                seconds = _round(world, payload, sides[name], IN_A_ROW[size])
                if i >= WARMUP:
                    mine[name] += seconds
        for name, transport in sides.items():
            payload.check(name, transport)
        every = world.gather_objects(mine)
        found[size] = {name: statistics.median(map(max, zip(*(of_rank[name] for of_rank in every)))) for name in sides}
    return found


def _round(world: World, payload: Payload, transport: Transport, times: int) -> list[float]:
    payload.exchange(transport)  # all ranks are here when it ends
    stamps = [time.perf_counter()]
    for _ in range(times):
        payload.exchange(transport)
        stamps.append(time.perf_counter())
    return [after - before for before, after in zip(stamps, stamps[1:])]


def _figures(ranks: int, seconds: dict[str, dict[str, float]], saved: Sequence[Saved]) -> dict[str, float]:
    prefix = "" if ranks == 2 else f"r{ranks}."
    figures = {f"dispatch.{name}_over_gloo.{prefix}{size}": s["gloo"] / s[name]
               for name in ("mpi", "islands") for size, s in seconds.items()}
    figures |= {f"dispatch.{name}_us.{prefix}{size}": 1e6 * value
                for size, s in seconds.items() for name, value in s.items()}
    return figures | {f"dispatch.dedup.{prefix}k{of.top_k}.saved_fraction": of.saved / of.bytes_plain for of in saved}


def _show(ranks: int, seconds: dict[str, dict[str, float]], saved: Sequence[Saved], rounds: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"\n{ranks} ranks, {cores} cores here; medians over {rounds} rounds, all in turn, arrivals checked")
    print(table(["bytes a rank sends", "gloo us", "MPI us", "islands us", "MPI over gloo", "islands over gloo"],
                [[size, *(f"{1e6 * s[name]:,.0f}" for name in ("gloo", "mpi", "islands")),
                  *(f"{s['gloo'] / s[name]:.2f}" for name in ("mpi", "islands"))] for size, s in seconds.items()]))
    for of in saved:
        print(f"{of.top_k} experts a token: between islands {of.rows_plain:,} rows, {of.rows:,} where a row goes once to an "
              f"island; {of.saved:,} of {of.bytes_plain:,} bytes saved, as counted from the routing")
