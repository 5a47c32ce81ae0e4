"""The whole bench: train and measure each router with each seed, some at a time, then time all in turn, then report."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from typing import Any, Iterator, NamedTuple, Sequence

import torch
from tqdm import tqdm

from moedist.bench.figures import write_figures
from moedist.bench.routers.keep import Results
from moedist.bench.routers.measures import Spread, spreads
from moedist.bench.routers.report import Row, figures_of, write_report
from moedist.bench.routers.settings import FULL, QUICK, Budget, base_config, config_of, default_variants
from moedist.bench.routers.speeds import measure_speeds
from moedist.bench.routers.training import train_and_measure
from moedist.config import Config
from moedist.data import prepare_corpus
from moedist.errors import MoedistError
from moedist.routing import ROUTERS, options_of
from moedist.world import find_launch, pick_device


class Job(NamedTuple):
    """One router with one seed."""

    variant: str
    seed: int
    budget: Budget
    overrides: tuple[str, ...]
    runs: str  # folder of run folders


def bench_routers(variants: Sequence[str] | None = None, quick: bool = False, seeds: int | None = None,
                  steps: int | None = None, workers: int | None = None, out: str | None = None,
                  json_path: str | None = None, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Print the table; write table.md, table.csv and pictures to `out` and figures to `json_path`.

    Args:
        variants: routers, with options as `compress --methods` has them (see `parse_variant`); None: all.
        quick: a smaller model, fewer steps and one seed.
        seeds, steps: instead of the budget's.
        workers: trainings at a time, each a process with one thread; 1: in this process. None: as many as cores, on an
            accelerator 1.
        out: also kept there: what is done, for a bench that was cut off, and the trained models.
        overrides: dotted overrides of the configuration that all are trained with.

    Returns:
        `routers.{router}.{figure}`, means over seeds, and with several seeds `routers.{router}.{figure}_std`.

    Raises:
        MoedistError: a router failed, after all others are done; or `out` holds results of other settings.
        ConfigError: an unknown router, option or key.
    """
    if (size := find_launch().size) > 1:
        raise MoedistError(f"bench routers trains models of one process side by side, but was started as {size} ranks; start "
                           "it on one, with --workers N for N trainings at a time")
    import nltk  # noqa: F401  missing: told before anything is trained
    start = time.perf_counter()
    budget = _budget(quick, seeds, steps)
    variants = list(dict.fromkeys(variants or default_variants()))
    with tempfile.TemporaryDirectory(prefix="bench-routers-") if out is None else nullcontext(out) as folder:
        for variant in variants:
            config = config_of(budget, variant, 0, str(folder), overrides)  # what is unknown is refused first
            options_of(ROUTERS[config.router.name], config.router)
        base = base_config(budget, str(folder), overrides)
        digest = prepare_corpus(base.data).digest
        results = Results(folder, _settings(budget, base, digest))
        wanted = [Job(variant, seed, budget, tuple(overrides), str(results.runs)) for seed in range(budget.seeds)
                  for variant in variants]
        errors = _train(wanted, results, workers or _workers(base))
        rows = _rows(variants, results, budget, errors)
        seconds = time.perf_counter() - start
        write_report(rows, budget, base, seconds, out)
        figures = figures_of(rows)
        write_figures(figures, json_path)
    if errors:
        raise MoedistError(f"{len(errors)} of {len(wanted)} trainings failed: " + "; ".join(
            f"{variant}, seed {seed}: {text}" for (variant, seed), text in errors.items()))
    return figures


def _budget(quick: bool, seeds: int | None, steps: int | None) -> Budget:
    budget = QUICK if quick else FULL
    return dataclasses.replace(budget, seeds=seeds or budget.seeds, steps=steps or budget.steps)


def _settings(budget: Budget, base: Config, digest: str) -> dict[str, Any]:
    """What the results in a folder have in common; routers and seeds may be added to it later."""
    config = dataclasses.asdict(base)
    for own in ("name", "folder", "seed"):  # of each training
        del config[own]
    return {"budget": {k: v for k, v in dataclasses.asdict(budget).items() if k not in ("config", "seeds")},
            "text": digest, "config": config}


def _workers(config: Config) -> int:
    if pick_device(config.world.device, find_launch()).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train(jobs: Sequence[Job], results: Results, workers: int) -> dict[tuple[str, int], str]:
    """Do what is not done yet; errors by router and seed."""
    missing = [job for job in jobs if results.get(job.variant, job.seed) is None]
    errors: dict[tuple[str, int], str] = {}
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} trainings were done before")
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="training", disable=None) as bar:
        for job, result in _done(missing, min(workers, max(len(missing), 1))):
            results.put(job.variant, job.seed, result)
            bar.update(1)
            name = f"{job.variant}, seed {job.seed}"
            if "error" in result:
                errors[job.variant, job.seed] = result["error"]
                bar.write(f"{name}: {result['error']}", file=sys.stderr)
            elif bar.disable:  # no terminal
                ppl, seconds = result["figures"]["ppl"], result["seconds"]
                print(f"{name}: perplexity {ppl:.2f}, {seconds:.0f} s", file=sys.stderr, flush=True)
            bar.set_postfix_str(name)
    return errors


def _done(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    if workers == 1:
        threads = torch.get_num_threads()
        _one_thread()
        try:
            yield from ((job, do(job)) for job in jobs)
        finally:
            torch.set_num_threads(threads)
        return
    pool: Executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        started: dict[Future, Job] = {pool.submit(do, job): job for job in jobs}
        for future in as_completed(started):
            yield started[future], future.result()
    except BrokenProcessPool as error:
        raise MoedistError("a training's process was killed, or crashed without a word (out of memory?); with --out FOLDER "
                           "the same command goes on from what was done, with --workers 1 one at a time") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """One thread for what is computed, and no worker that goes on when the command is gone (killed, it cannot say so)."""
    _one_thread()
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _one_thread() -> None:
    torch.set_num_threads(1)


def do(job: Job) -> dict[str, Any]:
    """Train and measure; an error is a result too."""
    try:
        config = config_of(job.budget, job.variant, job.seed, job.runs, job.overrides)
        return train_and_measure(config, job.budget, keep=job.seed == 0)._asdict()
    except Exception as error:  # of this router alone: the others go on
        text = str(error) if isinstance(error, MoedistError) else f"{type(error).__name__}: {error}"
        return {"error": text, "trace": traceback.format_exc()}


def _rows(variants: Sequence[str], results: Results, budget: Budget,
          errors: dict[tuple[str, int], str]) -> list[Row]:
    found = {variant: [r for seed in range(budget.seeds) if (r := results.get(variant, seed))] for variant in variants}
    folders = {variant: str(results.runs / of[0]["folder"]) for variant, of in found.items() if of and of[0]["folder"]}
    speeds = measure_speeds(folders, budget) if folders else {}
    rows = []
    for variant in variants:
        figures = spreads([r["figures"] for r in found[variant]]) if found[variant] else {}
        figures |= {name: Spread(value, 0.0, 1) for name, value in speeds.get(variant, {}).items()}
        texts = [f"seed {seed}: {text}" for (name, seed), text in errors.items() if name == variant]
        rows.append(Row(variant, figures, texts))
    return rows
