"""Alerts from numbers that are planted."""

import random

from moedist.config import MonitorConfig
from moedist.monitor import Alerts


def alerts(tmp_path, **keys):
    return Alerts(MonitorConfig(**keys), tmp_path)


def test_a_loss_spike_is_told_once(tmp_path):
    a, noise = alerts(tmp_path, loss_spike=0.5), random.Random(0)
    losses = [3 - 0.01 * i + noise.gauss(0, 0.02) for i in range(60)]
    assert [a.loss(loss) for loss in losses] == [None] * 60
    spike = a.loss(4.0)
    assert spike.kind == "loss spike" and "4.0000" in spike.text and not spike.fatal
    assert a.loss(4.0) is None


def test_a_noisy_loss_is_no_spike(tmp_path):
    a, noise = alerts(tmp_path, loss_spike=0.5), random.Random(0)
    assert not any(a.loss(3 + noise.gauss(0, 0.5)) for _ in range(200))
    assert alerts(tmp_path, loss_spike=0).loss(1e9) is None


def test_dead_experts_are_told_when_they_die(tmp_path):
    a = alerts(tmp_path, dead_after=7)
    assert a.dead({}) is None
    assert "layer 2 expert 5" in a.dead({2: [5]}).text and a.dead({2: [5]}) is None
    second = a.dead({2: [5], 4: [0]})
    assert "layer 4 expert 0" in second.text and "layer 2" not in second.text and "7 steps" in second.text
    a.dead({})
    assert a.dead({2: [5]}) is not None  # it was alive again


def test_a_rank_slower_than_its_plan(tmp_path):
    a, names = alerts(tmp_path, slow_rank=2.0), ["rank 0 (a)", "rank 1 (b)"]
    assert [a.slow((10, 10), (12, 25), names, "p") for _ in range(2)] == [None, None]  # twice is no habit
    told = a.slow((10, 10), (12, 25), names, "p")
    assert told.kind == "slow rank" and "rank 1 (b)" in told.text and "2.5 times" in told.text and "rank 0" not in told.text
    assert a.slow((10, 10), (12, 25), names, "p") is None
    assert not any(a.slow((10, 25), (12, 25), names, "another") for _ in range(5))
    assert not any(a.slow((), (12, 25), names, "no prediction") for _ in range(5))
    assert not any(a.slow((0.1, 0.1), (0.9, 0.9), names, "tiny") for _ in range(5))


def test_a_disk_that_fills_up(tmp_path):
    assert alerts(tmp_path, disk_gib=0).disk() is None
    a = alerts(tmp_path, disk_gib=0)
    assert "two checkpoints" in a.disk(checkpoint_bytes=2**70).text and a.disk(checkpoint_bytes=2**70) is None
    assert a.disk() is None and a.disk(2**70) is not None  # it had been better meanwhile
    assert alerts(tmp_path, disk_gib=2.0**40).disk().kind == "disk almost full"
