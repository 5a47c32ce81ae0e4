import time

import pytest

from moedist.timing import MOST_CREDIT_S, Meter, Throttle


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_waiting_is_not_compute_and_experts_are_timed_apart():
    meter = Meter()
    start = time.perf_counter()
    burn(0.02)
    expert_s = 0.0
    for seconds in (0.03, 0.01):
        before = time.perf_counter()
        with meter.expert(3):
            burn(seconds)
        expert_s += time.perf_counter() - before
        with meter.waiting():
            time.sleep(0.1)
    times = meter.take()
    total = time.perf_counter() - start
    assert times.expert_s == {3: pytest.approx(expert_s, abs=5e-3)}  # wall time, whatever it was
    assert times.dense_s < total - expert_s - 0.19 and times.dense_s > 0.019
    meter.begin(1)
    assert meter.take().expert_s == {}


def test_throttle_stretches_compute_and_nothing_else():
    meter = Meter(Throttle({0: 10.0}))
    meter.begin(0)
    start = time.perf_counter()
    with meter.expert(0):
        burn(0.02)
    burn(0.01)
    with meter.waiting():
        time.sleep(0.2)
    times = meter.take()
    total = time.perf_counter() - start
    assert 0.19 < times.expert_s[0] < 0.4
    assert 0.05 < times.dense_s < 0.3  # a tenth of a second, less what the experts' last sleep was too long
    assert total < times.expert_s[0] + times.dense_s + 0.4  # the wait was not stretched: that alone would be 2 s


def test_the_schedule_takes_effect_at_its_step():
    throttle = Throttle({0: 2.0, 10: 4.0})
    assert [throttle.at_step(s) or throttle.slowdown for s in (0, 9, 10, 50, 3)] == [2, 2, 4, 4, 2]
    assert Throttle({5: 3.0}).slowdown == 1


def stretched(slowdown: float) -> float:
    """Wall time over processor time of a hundred milliseconds of compute, a millisecond at a time."""
    throttle = Throttle({0: slowdown})
    start, compute = time.perf_counter(), time.process_time()
    for _ in range(100):
        burn(0.001)
        throttle.catch_up()
    return (time.perf_counter() - start) / (time.process_time() - compute)


def test_a_sleep_that_was_too_long_is_given_back():
    tries = (stretched(8.0) for _ in range(5))  # in one of them the machine has a core to spare
    assert any(7 < found < 9.5 for found in tries)


def over_declared_s(lost_s: float) -> float:
    """Seconds that a rank, slowed ten times, takes longer than its compute says, where it lost some before."""
    throttle = Throttle({0: 10.0})
    start, compute = time.perf_counter(), time.process_time()
    burn(0.005)
    time.sleep(lost_s)  # as if the core had been somebody else's
    throttle.catch_up()
    for _ in range(4):
        burn(0.005)
        throttle.catch_up()
    return time.perf_counter() - start - 10 * (time.process_time() - compute)


def test_time_lost_to_others_is_made_up_for():
    assert any(over_declared_s(0.12) < 0.04 for _ in range(5))  # 0.07 s more where it is not


def test_a_rank_that_was_held_up_for_long_is_slow_again_soon():
    throttle = Throttle({0: 10.0})
    time.sleep(1.0)
    throttle.catch_up()
    start = time.perf_counter()
    for _ in range(6):
        burn(0.005)
        throttle.catch_up()
    # of what was burnt: the process's own time holds that of the throttle and of other threads, which it does not stretch
    assert time.perf_counter() - start > 10 * 6 * 0.005 - MOST_CREDIT_S - 0.01
