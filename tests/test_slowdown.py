"""A rank becomes four times slower in the middle of a run: the next re-plan moves its load away, and says so."""

import dataclasses
import statistics
import time

from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.phases.train import StepReport, train_step
from moedist.placement import split_batch
from moedist.timing import Meter, Throttle
from moedist.trainer import build_run
from moedist.world import World
from tests.ranks import run_ranks

PERIOD = 12  # steps between re-plans
SLOW_FROM, SETTLED, WINDOW, WINDOWS = PERIOD, 3 * PERIOD, 8, 4
NEAR = 1.15  # of the bound
# all ranks are slowed, so that three of them need less than one core, and find it when they want it
SLOWDOWN = {0: (6.0, 6.0, 6.0), SLOW_FROM: (6.0, 6.0, 24.0)}
TREE = {"data": {"tokenizer": "byte", "sequence_length": 128, "max_documents": 150},
        "model": {"layers": 1, "width": 128, "heads": 4, "kv_heads": 2, "experts": 18, "top_k": 2, "expert_hidden": 192},
        "train": {"batch": 24, "lr": 1e-6, "eval_tokens": 64},  # so slow that the router stays as it is
        "placement": {"max_copies": 3, "replan_every": PERIOD, "probe_s": 2.0}, "monitor": {"wandb": "disabled"},
        "phases": [{"train": 1000}]}


@dataclasses.dataclass
class Seen:
    """One training: seconds and report of every step, sequences of every rank in the end, and what was said of re-plans."""

    seconds: list[float]
    reports: list[StepReport]
    sequences: list[int]
    said: list[str]


def train_through(world: World, folder: str, cache: str) -> Seen:
    world = dataclasses.replace(world, meter=Meter(Throttle({step: of[world.rank] for step, of in SLOWDOWN.items()})))
    config = config_from_dict(TREE, [f"folder={folder}", f"data.cache={cache}"])
    run = build_run(config, world, written_plan(config, world.size, None)[0])
    said: list[str] = []
    run.recorder.say = said.append
    seconds, reports = [], []
    while not _enough(world, reports):
        world.barrier()
        start = time.perf_counter()
        report = train_step(run)
        world.barrier()
        seconds.append(time.perf_counter() - start)
        reports.append(report)
        run.replan(report.loads, report.ranks, bool(report.sums["plan"]))
    return Seen(seconds, reports, split_batch(config.train.batch, run.plan.batch_shares), said)


def _enough(world: World, reports: list[StepReport]) -> bool:
    """Whether a window of steps after two re-plan periods was near the bound, or there were enough that were not; the same
    on every rank."""
    beyond, rest = divmod(len(reports) - SETTLED, WINDOW)
    return beyond > 0 and rest == 0 and (beyond >= WINDOWS or over_bound(reports[-WINDOW:]) < NEAR)


def over_bound(reports: list[StepReport]) -> float:
    """Step time over the least that these ranks could take, both without the time that collectives take.

    A step is its dense part and its experts, each as long as on the slowest rank. The least is all tokens, and all rows, over
    the sum of the speeds that the ranks showed in these steps.
    """
    ranks = range(len(reports[0].ranks.tokens))
    dense_W, expert_W = ([statistics.median(getattr(r.ranks, name)[i] for r in reports) for i in ranks]
                         for name in ("dense_s", "expert_s"))
    tokens_W = reports[0].ranks.tokens
    rows_W = [statistics.mean(sum(of[i] for of in r.ranks.rows.values()) for r in reports) for i in ranks]
    bound = sum(sum(work_W) / sum(n / s for n, s in zip(work_W, seconds_W))
                for work_W, seconds_W in ((tokens_W, dense_W), (rows_W, expert_W)))
    return (max(dense_W) + max(expert_W)) / bound


def test_a_rank_that_becomes_four_times_slower_loses_its_load(tmp_path, cache):
    seen = run_ranks(3, train_through, str(tmp_path), str(cache))[0]
    rows_W = seen.reports[-1].ranks.rows[0]
    assert rows_W[2] < sum(rows_W) / 6 and seen.sequences[2] <= 4  # a ninth would be its part: 1 of 4 + 4 + 1
    assert sum(seen.sequences) == 24 and sum(rows_W) == 24 * 128 * 2
    stale, settled = slice(SLOW_FROM, 2 * PERIOD), slice(-WINDOW, None)
    assert over_bound(seen.reports[stale]) > 1.8  # with the plan for equal ranks
    assert over_bound(seen.reports[settled]) < NEAR, [round(s, 3) for s in seen.seconds]
    # what counts in the end, collectives included
    assert statistics.median(seen.seconds[settled]) < statistics.median(seen.seconds[stale]) / 1.6
    moves = [line for line in seen.said if "re-plan: " in line and int(line.split()[1]) > SLOW_FROM + 1]
    assert int(moves[0].split()[1]) <= SLOW_FROM + 2 * PERIOD
    experts, _, batch = moves[0].partition("; batch moves: ")
    assert "experts move: " in experts and "rank 2 (" in experts and " times the " in experts and batch.startswith("rank 2 (")
