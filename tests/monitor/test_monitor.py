"""Metrics on loads known by hand, and what the recorder writes."""

import json

import pytest
import torch

from moedist.checkpoint import RunFolder
from moedist.config import Config, MonitorConfig
from moedist.monitor import Recorder, load_metrics, traffic_metrics, traffic_sums
from moedist.monitor.metrics import is_declared
from moedist.monitor.recorder import wandb_mode
from moedist.timing import Traffic


def test_load_metrics_by_hand():
    # two ranks, four experts: totals 8, 4, 0, 4; rank 0 computes the first three
    load_WE = torch.tensor([[6, 1, 0, 3], [2, 3, 0, 1]])
    values = load_metrics([load_WE], [[12, 4]])
    assert values == {"moe/load_imbalance": 2.0, "moe/rank_imbalance": 1.5, "moe/unused_experts": 1}
    both = load_metrics([load_WE, torch.ones(2, 4, dtype=torch.int64)], [[12, 4], [4, 4]])
    assert both == {"moe/load_imbalance": 1.5, "moe/rank_imbalance": 1.25, "moe/unused_experts": 1}
    assert load_metrics([], []) == {} == load_metrics([torch.zeros(2, 4)], [[0, 0]])


def test_traffic_metrics_by_hand():
    """Two layers, of which the second sends to another island; two ranks that do the same."""
    links = {(0, "own"): Traffic(bytes=100, transfer_s=0.2, wait_s=0.1, rows=4, pairs=6),
             (2, "other"): Traffic(50, 0.4, 0.3, 2, 6, square=torch.tensor(4.0), square_error=torch.tensor(1.0))}
    values = traffic_metrics(2 * traffic_sums(links, [0, 2]), [0, 2], 2)
    assert all(map(is_declared, values))
    assert values == pytest.approx({
        "comm/own_island_bytes": 200, "comm/own_island_ms": 200, "comm/own_island_wait_ms": 100,
        "comm/other_islands_bytes": 100, "comm/other_islands_ms": 400, "comm/other_islands_wait_ms": 300,
        "comm/layer.0/own_island_bytes": 200, "comm/layer.0/own_island_ms": 200,
        "comm/layer.2/other_islands_bytes": 100, "comm/layer.2/other_islands_ms": 400,
        "comm/dedup_ratio": 0.5, "comm/rounding_error": 0.5})
    assert traffic_metrics(traffic_sums({}, [0, 2]), [0, 2], 1) == {}


def recorder(tmp_path, is_main=True):
    config = Config(monitor=MonitorConfig(wandb="disabled"))
    return Recorder(config, RunFolder(tmp_path), is_main, total_steps=10)


def test_records_are_on_disk_at_once_and_other_ranks_write_nothing(tmp_path, capsys):
    r = recorder(tmp_path)
    r.record(1, {"train/loss": 2.5}, "one line")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.5}
    assert capsys.readouterr().out == "one line\n"
    other = recorder(tmp_path, is_main=False)
    other.record(2, {"train/loss": 2.5}, "nothing")
    other.say("nothing")
    assert capsys.readouterr().out == "" and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    r.close(), other.close()


def test_undeclared_metrics_are_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="train/lss"):
        recorder(tmp_path).record(1, {"train/lss": 1.0})


def test_wandb_is_offline_without_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode(MonitorConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode(MonitorConfig()) == "online" and wandb_mode(MonitorConfig(wandb="disabled")) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(MonitorConfig()) == "offline"
