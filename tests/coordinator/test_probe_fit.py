"""From times to a speed: the line, the spread, the amounts to measure."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedist.coordinator.probe_fit import fit_line, sample_sizes, spread_of


@given(st.floats(0, 1), st.floats(1, 1e6), st.lists(st.integers(1, 10**5), min_size=2, max_size=6, unique=True))
def test_times_on_a_line_give_the_line(call, per_s, amounts):
    line = fit_line(amounts, [call + n / per_s for n in amounts])
    for n in amounts:
        assert line.call_s + n / line.per_s == pytest.approx(call + n / per_s, rel=1e-3)
    assert line.error < 1e-3


def test_noise_is_taken_relative_to_the_time_it_is_in():
    noise = random.Random(0)
    amounts = [100, 200, 400, 800]
    speeds = [fit_line(amounts, [0.05 * noise.uniform(0.9, 1.1) + n / 1000 * noise.uniform(0.95, 1.05) for n in amounts]).per_s
              for _ in range(200)]
    assert statistics.median(speeds) == pytest.approx(1000, rel=0.02)
    assert statistics.quantiles(speeds, n=20)[0] > 850 and statistics.quantiles(speeds, n=20)[-1] < 1150


@pytest.mark.parametrize("amounts, seconds", [
    ([100, 200], [0.5, 0.4]),  # more takes less
    ([100, 200], [0.1, 0.4]),  # the call would take less than no time
    ([300], [0.3]),
])
def test_where_there_is_no_line_time_is_in_proportion(amounts, seconds):
    line = fit_line(amounts, seconds)
    assert line.call_s == 0 and line.per_s > 0
    assert min(t / n for t, n in zip(seconds, amounts)) <= 1 / line.per_s <= max(t / n for t, n in zip(seconds, amounts))
    assert line.error == pytest.approx(max(abs(n / line.per_s - t) / t for n, t in zip(amounts, seconds)))


def test_a_time_off_the_line_is_an_error_of_that_size():
    assert fit_line([100, 200, 400, 800], [0.1, 0.2, 0.6, 0.8]).error > 0.15


def test_spread_by_hand():
    assert spread_of([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)  # quartiles 2 and 4, median 3
    assert spread_of([7.0]) == 0 and spread_of([3.0] * 5) == 0
    assert spread_of([1.0] * 9 + [50.0]) == 0  # one odd round is no spread


@given(st.floats(0.1, 1e5), st.integers(1, 512))
def test_amounts_are_whole_units_ascending_and_two_at_least(share, unit):
    found = sample_sizes(share, [0.25, 0.5, 1.0], unit)
    assert len(found) >= 2 and found == sorted(set(found)) and all(n > 0 and n % unit == 0 for n in found)
    if share >= 8 * unit:
        assert found[-1] == pytest.approx(share, abs=unit / 2) and found[0] == pytest.approx(share / 4, abs=unit / 2)
