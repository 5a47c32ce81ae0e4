import time

from moedist.timing import Meter, Throttle


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_waiting_is_not_compute_and_experts_are_timed_apart():
    meter = Meter()
    burn(0.02)
    with meter.expert(3):
        burn(0.03)
    with meter.waiting():
        time.sleep(0.2)
    with meter.expert(3):
        burn(0.01)
    times = meter.take()
    assert 0.039 < times.expert_s[3] < 0.15
    assert 0.019 < times.dense_s < 0.15
    meter.begin(1)
    assert meter.take().expert_s == {}


def test_throttle_stretches_compute_and_nothing_else():
    meter = Meter(Throttle({0: 5.0}))
    meter.begin(0)
    start = time.perf_counter()
    with meter.expert(0):
        burn(0.02)
    burn(0.01)
    with meter.waiting():
        time.sleep(0.1)
    times = meter.take()
    assert 0.098 < times.expert_s[0] < 0.2
    assert 0.045 < times.dense_s < 0.15
    assert time.perf_counter() - start < 0.45  # 0.15 of compute, 0.1 of waiting: the wait was not stretched


def test_the_schedule_takes_effect_at_its_step():
    throttle = Throttle({0: 2.0, 10: 4.0})
    assert [throttle.at_step(s) or throttle.slowdown for s in (0, 9, 10, 50, 3)] == [2, 2, 4, 4, 2]
    assert Throttle({5: 3.0}).slowdown == 1


def test_a_sleep_that_was_too_long_is_given_back():
    throttle = Throttle({0: 3.0})
    start, compute = time.perf_counter(), time.process_time()
    for _ in range(50):
        burn(0.001)
        throttle.catch_up()
    stretched = (time.perf_counter() - start) / (time.process_time() - compute)
    assert 2.5 < stretched < 4
