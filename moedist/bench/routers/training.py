"""One router with one seed: trained by the trainer's own step, then measured on held-out text."""

from __future__ import annotations

import math
import shutil
import time
from typing import NamedTuple

import torch

from moedist.bench.routers.flops import flops_per_token
from moedist.bench.routers.routing import Pairs, RoutingWatch, agreement, mean_over_layers
from moedist.bench.routers.settings import Budget
from moedist.bench.routers.text import continuations, distinct, held_out_prompts, self_bleu, words
from moedist.bench.routers.uneven import makespan_over_bound
from moedist.config import Config, check_config
from moedist.coordinator import written_plan
from moedist.data import Tokenizer
from moedist.errors import MoedistError
from moedist.monitor import expert_utilisation, load_balance
from moedist.phases import Run
from moedist.phases.evaluation import held_out_loss
from moedist.phases.train import train_step
from moedist.placement import equal_layer, plan_layer
from moedist.routing import check_router
from moedist.trainer import build_run
from moedist.world import World

LAST_SHARE = 0.2  # of training: routing is compared with that before it, and its loads are what experts are placed by
NOISE = 0.05  # on a router's input, over the norm of each token
OTHER_SEED = 1  # of routers that draw at random, where their routing is looked at before the last share


class Outcome(NamedTuple):
    """Figures by name (see `moedist.bench.routers.measures`), the name of the run folder if it was kept, and seconds that it
    took."""

    figures: dict[str, float]
    folder: str | None
    seconds: float


def train_and_measure(config: Config, budget: Budget, keep: bool) -> Outcome:
    """Train as `config` says and measure; `keep` the run folder with a checkpoint.

    Raises:
        MoedistError: the router does not go with the model, or training diverged.
    """
    start = time.perf_counter()
    check_config(config, 1)
    check_router(config)
    with World.start(config.world) as world:
        run = build_run(config, world, written_plan(config, world.size, None)[0])
        try:
            trained, before = train_router(run, budget.steps)
            figures = measure(run, budget, trained, before)
            if keep:
                run.save()
        finally:
            run.recorder.close()
        if not keep:
            shutil.rmtree(run.folder.path)
    return Outcome(figures, run.folder.path.name if keep else None, time.perf_counter() - start)


def train_router(run: Run, steps: int) -> tuple[dict[int, torch.Tensor], Pairs]:
    """(layer -> rows of every expert in the last share of the steps, [E]; routing of held-out tokens before that share).

    Raises:
        MoedistError: the loss or a gradient is not finite.
    """
    run.model.train()
    tokens = run.config.train.batch * run.config.data.sequence_length
    mark = min(steps - 1, round(steps * (1 - LAST_SHARE)))
    loads: dict[int, torch.Tensor] = {}
    before: Pairs = {}
    for step in range(steps):
        if step == mark:
            before = routing_of(run)
        report = train_step(run)
        loss = report.sums["loss"] / tokens
        if not math.isfinite(loss) or (report.skipped and run.config.train.dtype != "float16"):  # which skips to scale
            raise MoedistError(f"training has diverged: loss {loss}, gradient norm {report.grad_norm} in step "
                               f"{run.progress.step}")
        if step >= mark:
            for layer, load_WE in report.loads.items():
                loads[layer] = loads.get(layer, 0) + load_WE.sum(0).double()
    return loads, before


@torch.no_grad()
def routing_of(run: Run) -> Pairs:
    """Who goes where, of the first batch of held-out tokens; routers that draw at random draw for themselves."""
    sequences = run.config.train.batch
    with RoutingWatch(run.model) as watch:
        held_out_loss(run.model, run.valid_stream.head(sequences), run.world, run.dtype, sequences, seed=OTHER_SEED)
    return watch.pairs


def measure(run: Run, budget: Budget, trained: dict[int, torch.Tensor], before: Pairs) -> dict[str, float]:
    """All figures of a trained router but its speeds."""
    model, world, config, stream = run.model, run.world, run.config, run.valid_stream
    with RoutingWatch(model, NOISE) as watch:
        held_out = held_out_loss(model, stream, world, run.dtype, config.train.batch)
    flops = flops_per_token(model, stream, world, run.dtype, config.train.batch)
    tokenizer = Tokenizer.load(run.folder.path)
    prompts = held_out_prompts(stream, budget.prompts, budget.prompt_tokens)
    texts = [words(tokenizer.decode(ids)) for ids in continuations(
        model, world, prompts, budget.new_tokens, config.data.sequence_length, run.dtype)]
    of_n = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    return {
        "balance": mean_over_layers(load_balance, trained),
        "balance_held_out": mean_over_layers(load_balance, watch.loads),
        "utilisation": mean_over_layers(expert_utilisation, watch.loads),
        "dropped": watch.dropped / watch.wanted if watch.wanted else 0.0,
        "diversity": sum(of_n.values()) / len(of_n), **of_n, "self_bleu": self_bleu(texts),
        "stability": agreement(before, watch.pairs), "stability_noise": agreement(watch.pairs, watch.noisy),
        "ppl": held_out.perplexity,
        "flops_per_token": flops.total, "expert_flops_per_token": flops.experts, "rows_per_token": flops.rows,
        "makespan_over_bound": makespan_over_bound(plan_layer, trained, watch.loads),
        "makespan_over_bound_equal": makespan_over_bound(equal_layer, trained, watch.loads),
    }
