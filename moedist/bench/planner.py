"""`moedist bench planner`: how near the bound placements are, and how long planning a layer takes.

Problems are made up: expert i gets rows in proportion to (i + 1)^-z (Zipf), speeds go from 1 to a ratio in powers of two, as
in a cluster of several generations of devices, and both are in random order.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import replace
from typing import Callable, NamedTuple

import numpy as np

from moedist.bench.figures import write_figures
from moedist.placement import LayerPlan, Problem, bound, equal_layer, lpt_layer, makespan, plan_layer, proportional_layer

ROWS = 65536  # of a layer in one step


class Point(NamedTuple):
    """One kind of problem: R ranks, E experts, the fastest rank over the slowest, the skew z of the loads."""

    ranks: int
    experts: int
    ratio: int
    skew: float

    @property
    def figure(self) -> str:
        return f"planner.r{self.ranks}.e{self.experts}.s{self.ratio}.z{self.skew:g}"


GRID = [Point(*p) for p in itertools.product((4, 16, 64, 256, 1024), (8, 64, 256), (1, 4, 8), (0, 0.6, 1.2))]
QUICK = [Point(*p) for p in itertools.product((4, 16), (8, 64), (8,), (0.6, 1.2))]
SEEDS = 3  # orders of experts and ranks
REPEATS = 3  # of a timed call, of which the fastest counts: the planner always does the same, other processes do not

METHODS: dict[str, Callable[[Problem], LayerPlan]] = {
    "equal": equal_layer,
    "proportional": proportional_layer,
    "lpt": lambda problem: lpt_layer(problem, local_search=False),
    "lpt_search": lambda problem: lpt_layer(problem, local_search=True),
    "full": plan_layer,
}


def zipf_problem(point: Point, seed: int) -> Problem:
    """A problem of this kind; as many copies as there are cuts in a wrap-around are allowed, at the least price."""
    rng = np.random.default_rng(seed)
    loads = np.arange(1, point.experts + 1) ** -float(point.skew)
    speeds = 2.0 ** np.round(np.log2(point.ratio) * np.arange(point.ranks) / (point.ranks - 1))
    return Problem(tuple(rng.permutation(ROWS * loads / loads.sum()).tolist()), tuple(rng.permutation(1e5 * speeds).tolist()),
                   max_copies=point.ranks - 1)


def measure(point: Point, seeds: int) -> dict[str, float]:
    """Medians over seeds: makespan over bound by method, copies and milliseconds of the full plan."""
    found: dict[str, list[float]] = {name: [] for name in (*METHODS, "copies", "ms")}
    for seed in range(seeds):
        problem = zipf_problem(point, seed)
        for name, method in METHODS.items():
            layer = method(problem)
            found[name].append(makespan(layer, problem) / bound(problem))
        found["copies"].append(layer.copies)  # of the last method, the full plan
        found["ms"].append(1e3 * min(_plan_s(problem) for _ in range(REPEATS)))
    return {name: statistics.median(values) for name, values in found.items()}


def _plan_s(problem: Problem) -> float:
    """Seconds of planning a layer that was not planned before."""
    plan_layer.cache_clear()
    fresh = replace(problem)  # without what a problem remembers of itself
    start = time.perf_counter()
    plan_layer(fresh)
    return time.perf_counter() - start


def bench_planner(quick: bool, json_path: str | None) -> dict[str, float]:
    """Measure, print a table, write the figures: `planner.r{R}.e{E}.s{ratio}.z{z}.over_bound`, `.ms_per_layer` and others."""
    figures: dict[str, float] = {}
    print("makespan over the bound sum(loads) / sum(speeds); the full plan may have up to ranks - 1 copies\n"
          f"{'ranks':>5} {'experts':>7} {'speeds':>6} {'Zipf':>4} | {'equal':>8} {'proport.':>8} {'LPT':>8} {'+ search':>8} "
          f"{'full':>7} {'copies':>6} | {'ms a layer':>10}")
    for point in QUICK if quick else GRID:
        r = measure(point, 1 if quick else SEEDS)
        print(f"{point.ranks:>5} {point.experts:>7} {point.ratio:>4}:1 {point.skew:>4g} | {r['equal']:>8.2f} "
              f"{r['proportional']:>8.2f} {r['lpt']:>8.3f} {r['lpt_search']:>8.3f} {r['full']:>7.4f} {r['copies']:>6.0f} | "
              f"{r['ms']:>10.1f}", flush=True)
        figures[f"{point.figure}.over_bound"] = r["full"]
        figures[f"{point.figure}.ms_per_layer"] = r["ms"]
        figures[f"{point.figure}.copies"] = r["copies"]
        figures |= {f"{point.figure}.{name}_over_bound": r[name] for name in METHODS if name != "full"}
    write_figures(figures, json_path)
    return figures
