"""What the recorder writes and says, and where Weights & Biases goes."""

import fcntl
import json
import math
import os
import select
import struct
import sys
import termios

import pytest
import torch

from moedist.checkpoint import RunFolder
from moedist.config import Config, MonitorConfig
from moedist.monitor import Alert, Recorder, traffic_metrics, traffic_sums
from moedist.monitor.display import Display
from moedist.monitor.metrics import is_declared
from moedist.monitor.wandb_run import wandb_group, wandb_mode
from moedist.timing import Traffic


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


def recorder(tmp_path, rank=0, output="auto"):
    config = Config(monitor=MonitorConfig(wandb="disabled", output=output))
    return Recorder(config, RunFolder(tmp_path), rank, total_steps=10, ranks=["node7, cuda:0", "node7, cuda:1"])


def test_records_are_on_disk_at_once_and_other_ranks_write_nothing(tmp_path, capsys):
    r = recorder(tmp_path)
    r.record(1, {"train/loss": 2.5}, "one line")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.5}
    assert capsys.readouterr().out == "one line\n"
    other = recorder(tmp_path, rank=1)
    other.record(2, {"train/loss": 2.5}, "nothing")
    other.say("nothing")
    other.alert(2, Alert("nothing", "nothing"))
    assert capsys.readouterr().out == "" and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    r.close(), other.close()


def test_what_is_not_finite_is_null_in_json(tmp_path):
    r = recorder(tmp_path)
    r.record(3, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 3, "train/loss": None, "train/grad_norm": None, "train/lr": 0.5}


@pytest.mark.parametrize("output, expected", [
    ("plain", ["hello", "step 1: 2.5", "warning: low", "step      1  ALERT dead experts: two", "done: 1 steps"]),
    ("quiet", ["warning: low", "step      1  ALERT dead experts: two", "done: 1 steps"]),
    ("json", [{"text": "hello"}, {"step": 1, "metrics": {"train/loss": 2.5}}, {"text": "warning: low"},
              {"step": 1, "alert": "dead experts", "text": "two"}, {"text": "done: 1 steps"}])])
def test_output_modes(tmp_path, capsys, output, expected):
    r = recorder(tmp_path, output=output)
    r.say("hello")
    r.record(1, {"train/loss": 2.5}, "step 1: 2.5")
    r.tick(1, "train 1/1", {"loss": "2.500"})  # no bar where it is not a terminal
    r.say("warning: low")
    r.alert(1, Alert("dead experts", "two"))
    r.say("done: 1 steps")
    lines = capsys.readouterr().out.splitlines()
    assert ([json.loads(line) for line in lines] if output == "json" else lines) == expected
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1]) == \
        {"step": 1, "alert": "dead experts", "text": "two"}


def test_time_left_is_at_the_pace_since_the_first_step(tmp_path, monkeypatch):
    """What comes before the second step (a start, a restore, the first step's warm-up) is no pace."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = Display("plain", total=110, first=100)
    now += 500
    display.tick(101, "train", {})
    assert display.eta(101) == "?:??:??"
    now += 60
    display.tick(102, "train", {})
    assert display.eta(102) == "0:08:00"
    now += 90
    display.tick(103, "train", {})
    assert display.eta(103) == "0:08:45"


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    """A pseudo-terminal in place of standard error: the bar shows phase, loss, speed, memory and the slowest rank."""
    ours, theirs = os.openpty()
    terminal = os.fdopen(theirs, "w")
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    monkeypatch.setattr(sys, "stderr", terminal)
    r = recorder(tmp_path)
    r.tick(4, "train 1/3", {"loss": "2.500", "tokens/s": "1,234", "memory": "0.5 GiB", "slowest": "rank 1"})
    r.tick(5, "train 1/3", {"loss": "2.400", "tokens/s": "1,234", "memory": "0.5 GiB", "slowest": "rank 1"})
    r._display._bar.refresh()
    terminal.flush()
    shown = ""
    while "loss 2.400" not in shown and select.select([ours], [], [], 5)[0]:
        shown += os.read(ours, 65536).decode()
    r.close()
    for word in ("train 1/3", "5/10", "loss 2.400", "tokens/s 1,234", "memory 0.5 GiB", "slowest rank 1"):
        assert word in shown, (word, shown)


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


def test_runs_of_a_sweep_are_grouped(monkeypatch):
    for name in ("WANDB_RUN_GROUP", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_group(Config(name="small")) == "small"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert wandb_group(Config(name="small")) == "abc"
    assert wandb_group(Config(monitor=MonitorConfig(group="mine"))) == "mine"
