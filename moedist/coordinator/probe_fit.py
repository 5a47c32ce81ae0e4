"""From measured times to a speed: pure functions of numbers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Sequence


@dataclass(frozen=True)
class Line:
    """Time of n rows (or tokens) = call_s + n / per_s.

    Attributes:
        error: largest relative deviation of a measured time from the line.
    """

    call_s: float
    per_s: float
    error: float


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> Line:
    """Least squares of relative deviations, since noise is a part of the time it is in; `call_s` is never below 0.

    Where times do not grow with the amount (noise, or one amount alone) all time is taken to be in proportion to it.

    Args:
        amounts, seconds: above 0, of equal length, at least one.

    >>> line = fit_line([100, 200, 400], [0.3, 0.5, 0.9])
    >>> round(line.call_s, 6), round(line.per_s, 3), round(line.error, 6)
    (0.1, 500.0, 0.0)
    """
    # minimise sum((call / t + slope * n / t - 1)^2) over call and slope
    ones = [1 / t for t in seconds]
    ratios = [n / t for n, t in zip(amounts, seconds)]
    a, b, c = (sum(x * y for x, y in zip(u, v)) for u, v in ((ones, ones), (ones, ratios), (ratios, ratios)))
    determinant = a * c - b * b
    call = slope = 0.0
    if determinant > 1e-9 * a * c:
        call = (c * sum(ones) - b * sum(ratios)) / determinant
        slope = (a * sum(ratios) - b * sum(ones)) / determinant
    if call <= 0 or slope <= 0:
        call, slope = 0.0, sum(ratios) / c
    error = max(abs(call + slope * n - t) / t for n, t in zip(amounts, seconds))
    return Line(call, 1 / slope, error)


def spread_of(values: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def sample_sizes(share: float, scales: Sequence[float], unit: int) -> list[int]:
    """Amounts to measure: `share` times every scale, in whole units, ascending and distinct, two at least.

    >>> sample_sizes(640, [0.5, 1, 2], 128)
    [256, 640, 1280]
    >>> sample_sizes(100, [0.25, 0.5, 1], 128)
    [128, 256]
    """
    units = sorted({max(1, round(share * scale / unit)) for scale in scales})
    if len(units) == 1:
        units.append(2 * units[0])
    return [unit * n for n in units]
