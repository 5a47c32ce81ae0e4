"""How fast every rank is: from the probe at first, then corrected by what every step took.

A rank takes call_s + n / per_s for n rows (or tokens). Speeds are corrected by a factor, measured over predicted time, so
that a rank with few rows, whose time is mostly the call, does not look slow.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, replace
from typing import Sequence

import numpy as np

from moedist.coordinator.facts import RankFacts

WINDOW = 12  # steps that the median is taken of: one odd step changes nothing, a change shows after half of them
LITTLE = 0.01  # of an equal part: a rank with so few rows is nearly all call, and no faster with fewer
ALIKE = 0.1  # speeds that differ by less are taken to be equal: measurements of equal ranks differ by as much


@dataclass(frozen=True)
class RankTimes:
    """What every rank did in one step, and the seconds it took, known to all ranks.

    Attributes:
        rows: expert rows of every rank [W], by layer.
        tokens: tokens of every rank's part of the batch, [W].
        expert_s, dense_s: seconds in experts, and computing outside experts and collectives, [W].
        work: as `rows`, as so many rows of uncompressed experts; None: the same.
    """

    rows: dict[int, list[int]]
    tokens: list[int]
    expert_s: list[float]
    dense_s: list[float]
    work: dict[int, list[int]] | None = None

    @property
    def expert_over_mean(self) -> float:
        """Expert time of the slowest rank over the mean of all: 1 where no rank waits for another."""
        total = sum(self.expert_s)
        return max(self.expert_s) * len(self.expert_s) / total if total else 1.0


@dataclass(frozen=True)
class Speeds:
    """call_s [W] seconds of a call, per_s [W] rows or tokens a second."""

    call_s: tuple[float, ...]
    per_s: tuple[float, ...]

    def seconds(self, rank: int, amount: float, calls: float) -> float:
        """Predicted time of a rank for so many rows or tokens in so many calls; a rank with nothing to do takes none."""
        if not amount:
            return 0.0
        return calls * self.call_s[rank] + amount / self.per_s[rank] if self.per_s[rank] else math.inf

    def seconds_of_all(self, amounts_W: Sequence[float], calls: float) -> np.ndarray:
        """`seconds` of every rank, [W]."""
        amounts, per_s = np.asarray(amounts_W, dtype=float), np.asarray(self.per_s)
        times = calls * np.asarray(self.call_s) + amounts / np.where(per_s > 0, per_s, 1.0)
        return np.where(amounts > 0, np.where(per_s > 0, times, np.inf), 0.0)

    def least_s(self, total: float, calls: float) -> float:
        """The least time in which the ranks can do `total` rows together, cut freely: those whose calls alone take longer
        stay out, all others are done at the same moment."""
        able = sorted((calls * c, s) for c, s in zip(self.call_s, self.per_s) if s > 0)
        work = speed = 0.0
        for (busy_s, s), (next_s, _) in zip(able, [*able[1:], (math.inf, 0.0)]):
            speed += s
            work += s * busy_s
            if (total + work) / speed <= next_s:
                break
        return (total + work) / speed

    def effective(self, total: float, calls: float) -> tuple[float, ...]:
        """Rows per second with the calls counted in, [W], where ranks share `total` so that all take equally long.

        The planner wants time in proportion to load; this is the proportion at the load it will find. A rank that would
        get next to nothing is judged by `LITTLE` of an equal part.
        """
        level_s, little = self.least_s(total, calls), LITTLE * total / len(self.per_s)
        parts = [max(little, s * (level_s - calls * c)) for c, s in zip(self.call_s, self.per_s)]
        return tuple(part / (calls * c + part / s) if s else 0.0 for part, c, s in zip(parts, self.call_s, self.per_s))

    def scaled(self, factors: Sequence[float]) -> "Speeds":
        """Each rank `factors[r]` times slower."""
        return Speeds(tuple(c * f for c, f in zip(self.call_s, factors)),
                      tuple(s / f for s, f in zip(self.per_s, factors)))

    def snapped(self) -> "Speeds":
        """Ranks whose speeds are alike get the same one."""
        return replace(self, call_s=_snap(self.call_s), per_s=_snap(self.per_s))


def _snap(values: Sequence[float]) -> tuple[float, ...]:
    """Values within `ALIKE` of the least of their group become its mean; groups are made from the least value up."""
    groups: list[list[int]] = []
    for r in sorted(range(len(values)), key=lambda r: values[r]):
        if groups and values[r] <= (1 + ALIKE) * values[groups[-1][0]]:
            groups[-1].append(r)
        else:
            groups.append([r])
    snapped = list(values)
    for group in groups:
        mean = statistics.fmean(values[r] for r in group)
        for r in group:
            snapped[r] = mean
    return tuple(snapped)


class SpeedTracker:
    """Speeds of all ranks as they are now.

    Args:
        facts: of every rank, from the probe. Speeds that were given, not measured, are never corrected.
    """

    def __init__(self, facts: Sequence[RankFacts]):
        self._expert = Speeds(tuple(f.expert_call_s for f in facts), tuple(f.expert_rows_per_s for f in facts))
        self._dense = Speeds(tuple(f.dense_call_s for f in facts), tuple(f.dense_tokens_per_s for f in facts))
        self._measured = all(f.measured for f in facts)
        # on an accelerator the host's clock says little about the dense part, and it is judged by the experts
        self._dense_timed = [f.device == "cpu" for f in facts]
        self._seen = [tuple(deque[float](maxlen=WINDOW) for _ in range(2)) for _ in facts]

    def observe(self, times: RankTimes, calls: int, expert_calls: int | None = None) -> None:
        """Take in one step, of `calls` forward and backward passes, and `expert_calls` of each layer's experts (None: as
        many)."""
        for r, (expert, dense) in enumerate(self._seen):
            layers = [rows[r] for rows in (times.work or times.rows).values()]
            predicted = sum(self._expert.seconds(r, rows, expert_calls or calls) for rows in layers)
            if predicted:
                expert.append(times.expert_s[r] / predicted)
            if times.tokens[r] and self._dense_timed[r]:
                dense.append(times.dense_s[r] / self._dense.seconds(r, times.tokens[r], calls))

    def forget(self) -> None:
        """The plan has changed: a rank that now has nothing to do is judged by what it did before."""
        for r, seen in enumerate(self._seen):
            for window in seen:
                if window:
                    last = statistics.median(window)
                    window.clear()
                    window.append(last)

    def factors(self) -> tuple[list[float], list[float]]:
        """How much slower than measured first every rank is now, in experts and elsewhere, [W] each.

        A rank without experts is judged by its dense part, one without a batch by its experts.
        """
        found = [[statistics.median(window) if window else None for window in seen] for seen in self._seen]
        typical = [statistics.median([f[i] for f in found if f[i] is not None] or [1.0]) for i in range(2)]
        pairs = []
        for expert, dense in found:
            if expert is None:
                expert = typical[0] if dense is None else typical[0] * dense / typical[1]
            if dense is None:
                dense = typical[1] * expert / typical[0]
            pairs.append((expert, dense))
        return [p[0] for p in pairs], [p[1] for p in pairs]

    def speeds(self) -> tuple[Speeds, Speeds]:
        """Speeds in experts (rows) and elsewhere (tokens), corrected by what was seen."""
        if not self._measured:
            return self._expert, self._dense
        expert, dense = self.factors()
        return self._expert.scaled(expert).snapped(), self._dense.scaled(dense).snapped()
