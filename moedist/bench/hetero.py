"""Real training on ranks of four speeds: the measured plan against equal placement with equal batches.

Four processes of this machine are slowed down to speeds 8 : 4 : 2 : 1 by sleeping in proportion to what they compute, so
that two cores carry all four. Both go on from one checkpoint, written after some steps at full speed: a router that has
just been made sends its tokens elsewhere every few steps, and placing experts is of little use before it has settled. Both
trainings go on side by side, some steps of one, some of the other.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moedist.bench.figures import write_figures
from moedist.bench.sides import Side
from moedist.checkpoint import read_meta
from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.errors import MoedistError
from moedist.phases import Run
from moedist.phases.train import StepReport, train_step
from moedist.placement import split_batch
from moedist.trainer import build_run
from moedist.world import World, find_launch

SLOWDOWN = (4.0, 8.0, 16.0, 32.0)  # the fastest is slowed too: four ranks together then need less than two cores
PREFIX = "hetero.8421"
CONFIG: dict[str, Any] = {
    "name": "hetero", "data": {"tokenizer": "byte", "sequence_length": 64, "max_documents": 300},
    "model": {"layers": 2, "width": 96, "heads": 4, "kv_heads": 2, "experts": 32, "top_k": 2, "expert_hidden": 128},
    # float64: what then differs between the two trainings is the placement's doing, not rounding that flips a near tie
    "train": {"batch": 60, "lr": 1e-3, "warmup_steps": 20, "eval_tokens": 64, "dtype": "float64"},
    "router": {"balance_loss": 0.02}, "placement": {"max_copies": 4, "replan_every": 5, "probe_s": 6.0},
    "world": {"device": "cpu"},
    "monitor": {"wandb": "disabled"},
}
BLOCK = 5  # steps of one training before the other goes on


def bench_hetero(settle: int, warmup: int, steps: int, json_path: str | None) -> dict[str, float]:
    """Measure and print; starts its four ranks itself unless it runs under a launcher.

    Args:
        settle: steps at full speed before both trainings; warmup: steps of each that are not measured; steps: measured.

    Raises:
        MoedistError: started on a number of ranks other than one or four, or a rank failed.
    """
    size = find_launch().size
    if size == 1:
        return _start_ranks(settle, warmup, steps, json_path)
    if size != len(SLOWDOWN):
        raise MoedistError(f"bench hetero plays {len(SLOWDOWN)} ranks but was started on {size}; start it on one, it starts "
                           "the others itself")
    config = config_from_dict(CONFIG, [f"world.slowdown={{0: {[1.0] * len(SLOWDOWN)}, {settle}: {list(SLOWDOWN)}}}"])
    with World.start(config.world) as world, tempfile.TemporaryDirectory() as folder:
        folder = world.broadcast_object(folder)
        length = settle + warmup + steps  # of the schedule: what is measured is the end of a training
        checkpoint = _settle(world, folder, settle, length)
        sides = {name: Side(_build(world, folder, name, planner, length, checkpoint))
                 for name, planner in (("equal", "equal"), ("planned", "measured"))}
        for block in range((warmup + steps) // BLOCK):
            for side in sides.values():
                for _ in range(BLOCK):
                    side.step(world, measured=block * BLOCK >= warmup)
        figures = _figures(world, sides)
        if world.is_main:
            _show(sides, figures)
            write_figures(figures, json_path)
        return figures


def _start_ranks(settle: int, warmup: int, steps: int, json_path: str | None) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", str(len(SLOWDOWN)), "-m", "moedist", "bench", "hetero", "--settle", str(settle),
               "--warmup", str(warmup), "--steps", str(steps), *(["--json", json_path] if json_path else [])]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise MoedistError(f"the ranks ended with exit code {done.returncode}; what they said stands above")
    return {}


def _settle(world: World, folder: str, steps: int, length: int) -> Path:
    """A checkpoint after `steps` steps of equal ranks at full speed."""
    run = _build(world, folder, "settle", "equal", length)
    start = time.perf_counter()
    for _ in range(steps):
        train_step(run)
    run.save()
    run.recorder.say(f"{steps} steps at full speed took {time.perf_counter() - start:.0f} s")
    return run.folder.checkpoint(steps)


def _build(world: World, folder: str, name: str, planner: str, length: int, checkpoint: Path | None = None) -> Run:
    config = config_from_dict(CONFIG, [f"placement.planner={planner}", f"name={name}", f"folder={folder}",
                                       f"phases=[{{train: {length}}}]"])
    meta = read_meta(checkpoint) if checkpoint else None
    return build_run(config, world, written_plan(config, world.size, None)[0], checkpoint=checkpoint, meta=meta)


def _figures(world: World, sides: dict[str, Side]) -> dict[str, float]:
    step_s = {name: statistics.median(side.seconds) for name, side in sides.items()}
    differences = [abs(a - b) for a, b in zip(*(side.losses for side in sides.values()))]
    return {f"{PREFIX}.step_speedup": step_s["equal"] / step_s["planned"],
            f"{PREFIX}.expert_over_bound": expert_over_bound(world, sides["planned"].reports),
            f"{PREFIX}.expert_over_bound_equal": expert_over_bound(world, sides["equal"].reports),
            f"{PREFIX}.max_loss_diff": max(differences),
            f"{PREFIX}.equal_step_ms": 1e3 * step_s["equal"], f"{PREFIX}.planned_step_ms": 1e3 * step_s["planned"]}


def expert_over_bound(world: World, reports: list[StepReport]) -> float:
    """Measured expert phase over the least that these ranks could take for the same rows; every rank must call it.

    The phase of a layer lasts as long as its slowest rank, since all wait for each other after it. The least is all rows
    over the sum of the ranks' speeds, which are those measured in the same steps.
    """
    phase, total_rows = 0.0, 0
    rows_W, seconds_W = [0.0] * world.size, [0.0] * world.size
    for times in zip(*world.gather_objects([r.times.expert_s for r in reports])):
        phase += sum(max(t.get(layer, 0.0) for t in times) for layer in reports[0].loads)
        seconds_W = [s + sum(t.values()) for s, t in zip(seconds_W, times)]
    for report in reports:
        for rows in report.ranks.rows.values():
            rows_W = [a + b for a, b in zip(rows_W, rows)]
            total_rows += sum(rows)
    speeds = [rows / seconds for rows, seconds in zip(rows_W, seconds_W) if seconds]
    return phase / (total_rows / sum(speeds))


def _show(sides: dict[str, Side], figures: dict[str, float]) -> None:
    print(f"\nfour ranks slowed {', '.join(f'{s:g}' for s in SLOWDOWN)} times; median of {len(sides['equal'].seconds)} steps each, "
          f"{BLOCK} of one training and {BLOCK} of the other in turn")
    for name, side in sides.items():
        run, layer = side.run, side.run.plan.layers[0][1]
        counts = split_batch(run.config.train.batch, run.plan.batch_shares)
        expert_ms = [1e3 * statistics.median(r.ranks.expert_s[rank] for r in side.reports) for rank in range(len(counts))]
        print(f"{name:>8}: step {figures[f'{PREFIX}.{name}_step_ms']:7.1f} ms; ranks have experts "
              f"{[len(layer.experts_of_rank(r)) for r in range(len(counts))]} (first layer, {layer.copies} copies), sequences "
              f"{counts}, expert ms {[round(ms) for ms in expert_ms]}")
    for name, value in figures.items():
        print(f"  {name} {value:.3g}")
