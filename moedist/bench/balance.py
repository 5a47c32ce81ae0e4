"""Balancing without moving experts: by a loss, with a bias to equal loads, and with both to the ranks' speeds.

Four ranks of speeds 4 : 2 : 1 : 1 have as many experts each. Three trainings start from the same weights and go through the
same text side by side, some steps of each in turn: `loss` (the balance loss alone), `bias` (a bias beside it, equal loads) and
`speed` (the same, where both aim at loads in proportion to speed). First at full speed, for the loads, which are counted, and
the perplexity; then slowed down by sleeping in proportion to what is computed, for the time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from typing import Any, Sequence

from moedist.bench.figures import write_figures
from moedist.bench.hetero import expert_over_bound
from moedist.bench.sides import Side
from moedist.config import Config, check_config, config_from_dict
from moedist.coordinator import written_plan
from moedist.errors import MoedistError
from moedist.phases.train import StepReport, evaluate
from moedist.trainer import build_run
from moedist.world import World, find_launch

SPEEDS = (4.0, 2.0, 1.0, 1.0)
SLOWDOWN = (4.0, 8.0, 16.0, 16.0)  # the fastest is slowed too: four ranks together then need less than two cores
BIAS = ["router.bias_rate={rate}", "router.bias_rule=proportional"]
SIDES = {"loss": [], "bias": BIAS, "speed": [*BIAS, "router.balance_to=speed"]}
CONFIG: dict[str, Any] = {
    "name": "balance", "data": {"tokenizer": "byte", "sequence_length": 64, "max_documents": 600},
    "model": {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "experts": 16, "top_k": 2, "expert_hidden": 128},
    "train": {"batch": 96, "lr": 2e-3, "warmup_steps": 20, "eval_every": 0, "eval_tokens": 65536},
    "router": {"balance_loss": 0.01}, "placement": {"counts": [4, 4, 4, 4], "speeds": list(SPEEDS), "replan_every": 50},
    "world": {"device": "cpu"}, "monitor": {"wandb": "disabled", "output": "quiet"}, "checkpoint": {"every": 0},
}
BLOCK = 5  # steps of one training before the next goes on
LAST = 50  # steps at full speed whose loads are looked at


def bench_balance(steps: int, timed: int, rate: float, json_path: str | None, seeds: Sequence[int] = (0,),
                  overrides: Sequence[str] = ()) -> dict[str, float]:
    """Measure and print; starts its four ranks itself unless it runs under a launcher.

    Args:
        steps: of each training at full speed; timed: slowed down, after that, of `bias` and `speed` alone.
        rate: `router.bias_rate` of both.
        seeds: of the weights and the order of the text; figures are means over them.
        overrides: of `bias` and `speed`, such as `router.balance_loss=0`.

    Raises:
        MoedistError: started on a number of ranks other than one or four, or a rank failed.
        ConfigError: an override that cannot be.
    """
    size = find_launch().size
    _configs("", rate, seeds[0], steps + timed, overrides)  # what cannot be is refused before ranks start
    if size == 1:
        return _start_ranks(steps, timed, rate, json_path, seeds, overrides)
    if size != len(SPEEDS):
        raise MoedistError(f"bench balance plays {len(SPEEDS)} ranks but was started on {size}; start it on one, it starts "
                           "the others itself")
    slowdown = f"world.slowdown={{0: {[1.0] * len(SPEEDS)}, {steps}: {list(SLOWDOWN)}}}"
    found: list[dict[str, float]] = []
    with World.start(config_from_dict(CONFIG, [slowdown]).world) as world, tempfile.TemporaryDirectory() as folder:
        folder = world.broadcast_object(folder)
        for seed in seeds:
            sides = {name: Side(build_run(config, world, written_plan(config, world.size, None)[0]))
                     for name, config in _configs(folder, rate, seed, steps + timed, overrides).items()}
            found.append(_one_seed(world, sides, steps, timed if seed == seeds[-1] else 0))
            world.say(f"seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in found[-1].items()))
        figures = {f"balance.4211.{name}": statistics.mean(of[name] for of in found if name in of) for name in found[-1]}
        if world.is_main:
            print(f"\nranks of speeds {SPEEDS} with 4 of 16 experts each, {steps} steps, seeds {list(seeds)}, bias rate "
                  f"{rate:g}{''.join(f', {one}' for one in overrides)}; loads of the last {LAST} steps")
            for name, value in figures.items():
                print(f"  {name} {value:.4g}")
            write_figures(figures, json_path)
        return figures


def _one_seed(world: World, sides: dict[str, Side], steps: int, timed: int) -> dict[str, float]:
    for block in range(steps // BLOCK):
        for side in sides.values():
            for _ in range(BLOCK):
                side.step(world, measured=(block + 1) * BLOCK > steps - LAST)
    figures: dict[str, float] = {}
    for name, side in sides.items():
        evaluate(side.run)
        side.run.model.train()
        figures |= {f"{name}.rows_over_bound": rows_over_bound(side.reports, SPEEDS),
                    f"{name}.rows_in_place": rows_in_place(side.reports), f"{name}.perplexity": side.run.held_out.perplexity}
        side.reports.clear()
        side.seconds.clear()
    for name, other in (("bias", "loss"), ("speed", "bias"), ("speed", "loss")):
        figures[f"{name}.perplexity_over_{other}"] = figures[f"{name}.perplexity"] / figures[f"{other}.perplexity"]
    if timed:
        of_time = {name: sides[name] for name in ("bias", "speed")}
        for block in range(timed // BLOCK):
            for side in of_time.values():
                for _ in range(BLOCK):
                    side.step(world, measured=block > 0)
        for name, side in of_time.items():
            figures[f"{name}.timed_over_bound"] = expert_over_bound(world, side.reports)
        bias_s, speed_s = (_phase_s(world, of_time[name].reports) for name in ("bias", "speed"))
        figures["speed.expert_phase_ratio"] = bias_s / speed_s
    return figures


def rows_over_bound(reports: Sequence[StepReport], speeds: Sequence[float]) -> float:
    """Expert phase of steps from counted rows: sum over layers of max(rows / speed), over that of rows cut by speed."""
    phase = bound = 0.0
    for report in reports:
        for rows in report.ranks.rows.values():
            phase += max(n / s for n, s in zip(rows, speeds))
            bound += sum(rows) / sum(speeds)
    return phase / bound


def rows_in_place(reports: Sequence[StepReport]) -> float:
    """1 - sum_e |f_e - 1/E| / 2, mean over steps and layers: the part of the rows that are where equal loads want them."""
    found = []
    for report in reports:
        for load_WE in report.loads.values():
            part_E = load_WE.sum(0).double() / load_WE.sum()
            found.append(1 - float((part_E - 1 / len(part_E)).abs().sum()) / 2)
    return statistics.mean(found)


def _phase_s(world: World, reports: Sequence[StepReport]) -> float:
    """Measured expert phase: of every layer the time of the slowest rank, summed. Every rank must call it."""
    of_ranks = world.gather_objects([r.times.expert_s for r in reports])
    return sum(max(t.get(layer, 0.0) for t in times) for times in zip(*of_ranks) for layer in reports[0].loads)


def _configs(folder: str, rate: float, seed: int, length: int, overrides: Sequence[str]) -> dict[str, Config]:
    """The three trainings.

    Raises:
        ConfigError: an override that cannot be.
    """
    found = {}
    for name, of in SIDES.items():
        own = [*(one.format(rate=rate) for one in of), *(overrides if of else ())]
        found[name] = config_from_dict(CONFIG, [f"name={name}", f"folder={folder}/{seed}", f"seed={seed}",
                                                f"phases=[{{train: {length}}}]", *own])
        check_config(found[name], len(SPEEDS))
    return found


def _start_ranks(steps: int, timed: int, rate: float, json_path: str | None, seeds: Sequence[int],
                 overrides: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", str(len(SPEEDS)), "-m", "moedist", "bench", "balance", *overrides, "--steps", str(steps),
               "--timed", str(timed), "--rate", str(rate), "--seeds", *map(str, seeds),
               *(["--json", json_path] if json_path else [])]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise MoedistError(f"the ranks ended with exit code {done.returncode}; what they said stands above")
    return {}
