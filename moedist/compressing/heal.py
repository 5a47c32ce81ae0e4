"""What a little training after compression brings: against the same model trained as long without compression, and with the
optimizer's moments carried over against fresh ones."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any, Sequence

from tqdm import tqdm

from moedist.bench.figures import write_figures
from moedist.checkpoint import RunFolder, read_meta
from moedist.compressing.sweep import parse_variant
from moedist.config import CompressConfig, Config, check_config, compress_options, for_ranks
from moedist.coordinator import equal_plan
from moedist.phases import Run
from moedist.phases.compress import compress_experts
from moedist.phases.evaluation import held_out_loss
from moedist.phases.train import train_step
from moedist.text_table import table
from moedist.trainer import build_run
from moedist.world import World, find_launch

MARKS = (10, 25, 50, 100)  # steps after which all are compared


def heal_run(run_folder: str, methods: Sequence[str], ratio: float, steps: int, tokens: int = 65536, overrides: Sequence[str] = (),
             step: int | None = None, json_path: str | None = None, more: Sequence[str] = ()) -> dict[str, float]:
    """Train copies of a checkpoint for `steps` steps, at the end of the run's schedule made longer by as many; print a table.

    Each method (`NAME+OPTION=VALUE+...`) is compressed by `ratio` once and trained twice. No run is written. Steps of
    distillation are among the `steps`.

    Args:
        more: further keys of a compress phase, such as "distill_steps=20".

    Returns:
        `compress.{method}.{ratio}.healed_ratio`, perplexity over the uncompressed model's after the same steps, and
        `compress.{method}.{ratio}.{moments,fresh}.{steps}`, the ratios on the way.
    """
    size, folder = find_launch().size, RunFolder(run_folder)
    checkpoint = folder.of_step(step)
    meta = read_meta(checkpoint)
    config, _ = for_ranks(folder.config(list(overrides)), size)
    config = dataclasses.replace(
        config, phases=[{"train": meta["progress"]["step"] + steps}],
        monitor=dataclasses.replace(config.monitor, wandb="disabled"), name=f"{config.name}-heal")
    check_config(config, size)
    marks = sorted({0, *(m for m in MARKS if m < steps), steps})
    with World.start(config.world) as world:
        trial = _Trial(world, config, checkpoint, meta, marks)
        base = trial.run(None, True)
        rows, figures = [["uncompressed", *(f"{p:.3f}" for p in base)]], {}
        for method in methods:
            for name, carry in (("moments", True), ("fresh", False)):
                plain, options, budget = parse_variant(method)
                c = dataclasses.replace(compress_options(plain, ratio, tokens, more), budget=budget, options=options)
                found = [a / b for a, b in zip(trial.run(c, carry), base)]
                figures.update({f"compress.{method}.{ratio:g}.{name}.{m}": value
                                for m, value in zip(marks, found) if value == value})
                rows.append([f"{method} {ratio:g}, {name}", *(f"{value:.4f}x" if value == value else "" for value in found)])
                if carry:
                    figures[f"compress.{method}.{ratio:g}.healed_ratio"] = found[-1]
        if world.is_main:
            print(f"{checkpoint}, validation: perplexity of the uncompressed model after so many more steps, and over it")
            print(table(["experts", *(f"{m} steps" for m in marks)], rows))
            write_figures(figures, json_path)
    return figures


@dataclasses.dataclass(frozen=True)
class _Trial:
    """One checkpoint, trained on again and again."""

    world: World
    config: Config
    checkpoint: Path
    meta: dict[str, Any]
    marks: list[int]

    def run(self, c: CompressConfig | None, carry: bool) -> list[float]:
        """Perplexity at the marks, compressed before by `c`, with Adam's moments carried over or made anew; nan at marks that
        are over before distillation is."""
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(self.config, folder=self.world.broadcast_object(folder))
            run = build_run(config, self.world, equal_plan(config, self.world.size), None, self.checkpoint, self.meta)
            distilled = 0
            if c is not None:
                compress_experts(run, c)
                distilled = c.distill_steps
                run.progress.step += distilled  # the learning rate goes on behind them
                if not carry:
                    run.engine.experts.rebuild({}, 0)
            found = [math.nan for mark in self.marks if mark < distilled]
            bar = tqdm(range(distilled, self.marks[-1] + 1), desc=c.method if c else "uncompressed", unit="step", leave=False,
                       disable=not self.world.is_main or None)
            for done in bar:
                if done in self.marks:
                    found.append(self._perplexity(run))
                if done < self.marks[-1]:
                    run.model.train()
                    train_step(run)
            run.recorder.close()
        return found

    def _perplexity(self, run: Run) -> float:
        sequences = max(run.config.train.batch, self.world.size)
        return held_out_loss(run.model, run.valid_stream, self.world, run.dtype, sequences).perplexity
