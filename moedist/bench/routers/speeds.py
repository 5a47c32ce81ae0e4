"""Tokens a second in training and in generation, all routers in turn, so that other work on the machine hits all alike."""

from __future__ import annotations

import statistics
from typing import Any, Mapping

import torch

from moedist.bench.interleave import interleaved_seconds
from moedist.bench.routers.settings import Budget
from moedist.bench.routers.text import continuations, held_out_prompts
from moedist.checkpoint import RunFolder
from moedist.phases import Run
from moedist.phases.train import train_step
from moedist.trainer import resumed_run
from moedist.world import World


def measure_speeds(folders: Mapping[str, str], budget: Budget) -> dict[str, dict[str, float]]:
    """By router: `train_tps`, `generate_tps`, medians over rounds, and their quartiles, `train_tps_q1` and so on.

    Args:
        folders: run folders with a checkpoint. On a CPU everything is computed in one thread: small models gain little from
            more, and threads that wait for each other on a busy machine lose much.
    """
    config = RunFolder(next(iter(folders.values()))).config()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with World.start(config.world) as world:
            runs = {name: resumed_run(RunFolder(path).config(), world, RunFolder(path)) for name, path in folders.items()}
            try:
                return _in_turn(runs, world, budget)
            finally:
                for run in runs.values():
                    run.recorder.close()
    finally:
        torch.set_num_threads(threads)


def _in_turn(runs: Mapping[str, Run], world: World, budget: Budget) -> dict[str, dict[str, float]]:
    def generating(run: Run) -> Any:
        prompts = held_out_prompts(run.valid_stream, budget.prompts, budget.prompt_tokens)
        return lambda: continuations(run.model, world, prompts, budget.new_tokens, run.config.data.sequence_length, run.dtype)

    def training(run: Run) -> Any:
        run.model.train()
        return lambda: train_step(run)

    found: dict[str, dict[str, float]] = {name: {} for name in runs}
    # first generation: by the weights that were measured
    for figure, work in (("generate_tps", generating), ("train_tps", training)):
        seconds = interleaved_seconds({name: work(run) for name, run in runs.items()}, budget.rounds, 1, world.device,
                                      slow_factor=float("inf"))
        for name, run in runs.items():
            t = run.config
            tokens = t.train.batch * t.data.sequence_length if work is training else budget.prompts * budget.new_tokens
            rates = [tokens / s for s in seconds[name]]
            q1, median, q3 = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
            found[name] |= {figure: median, f"{figure}_q1": q1, f"{figure}_q3": q3}
    return found
