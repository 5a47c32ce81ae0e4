"""`moedist bench link`, in a few steps."""

import json
import os
import subprocess
import sys

from moedist.bench.shaped_link import lacking
from moedist.bench.slow_link import bench_slow_link
from tests.launching import ROOT, environment
from tests.ranks import needs


def test_it_makes_the_link_and_writes_the_figures(tmp_path, cache):
    needs(lacking())
    path = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, "-m", "moedist", "bench", "link", "--steps", "1", "--json", str(path)], cwd=ROOT,
                          env=environment(cache), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {name.removeprefix("dispatch.islands."): value for name, value in json.loads(path.read_text()).items()}
    assert figures["step_speedup_1gbit"] == figures["plain_step_ms"] / figures["islands_step_ms"] > 0
    assert figures["plain_row_mb"] > 12 * figures["islands_row_mb"] > 0  # a quarter of the rows, each a quarter as long
    assert 0 < figures["max_loss_diff"] < 1e-3


def test_where_it_cannot_be_made_it_is_left_out_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert bench_slow_link(1, None) == {} and "network namespaces need root" in capsys.readouterr().out
