"""A rank that the system itself slows down, by a CPU quota: the next re-plans move its load away."""

import contextlib
import os

import pytest

from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.phases.train import train_step
from moedist.trainer import build_run
from moedist.world import World
from tests.quota import cpu_quota, why_no_quota
from tests.ranks import run_ranks

PERIOD, MOST_PERIODS = 8, 5
CORES = 0.05  # of the slow rank: the other has several times that even on a machine that does much else
TREE = {"data": {"tokenizer": "byte", "sequence_length": 64, "max_documents": 40},
        "model": {"layers": 1, "width": 64, "heads": 2, "kv_heads": 1, "experts": 16, "top_k": 2, "expert_hidden": 128},
        "train": {"batch": 16, "lr": 1e-6, "eval_tokens": 64},
        "placement": {"replan_every": PERIOD, "probe_s": 1.0}, "monitor": {"wandb": "disabled"}, "phases": [{"train": 1000}]}


def train_under_quota(world: World, folder: str, cache: str):
    """Expert rows of both ranks, step by step, and what was said; rank 1 has a quota after the first `PERIOD` steps."""
    config = config_from_dict(TREE, [f"folder={folder}", f"data.cache={cache}"])
    run = build_run(config, world, written_plan(config, world.size, None)[0])
    said: list[str] = []
    run.recorder.say = said.append
    rows = []
    with contextlib.ExitStack() as stack:
        while len(rows) < MOST_PERIODS * PERIOD and not (len(rows) > PERIOD and share(rows[-1]) < share(rows[PERIOD - 1]) / 3):
            if len(rows) == PERIOD and world.rank == 1:
                stack.enter_context(cpu_quota(os.getpid(), CORES))
            report = train_step(run)
            rows.append(report.ranks.rows[0])
            run.replan(report.loads, report.ranks, bool(report.sums["plan"]))
    return rows, said


def share(rows_W: list[int]) -> float:
    """Part of all rows that rank 1 has."""
    return rows_W[1] / sum(rows_W)


@pytest.mark.skipif(why_no_quota() is not None, reason=str(why_no_quota()))
def test_load_leaves_a_rank_with_a_cpu_quota(tmp_path, cache):
    rows, said = run_ranks(2, train_under_quota, str(tmp_path), str(cache))[0]
    assert PERIOD < len(rows) < MOST_PERIODS * PERIOD and share(rows[-1]) < share(rows[PERIOD - 1]) / 3
    assert any("experts move: rank 1 (" in line and int(line.split()[1]) > PERIOD for line in said)
