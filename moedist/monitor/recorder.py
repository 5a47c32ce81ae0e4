"""Rank 0's outlet: JSONL in the run folder, Weights & Biases, and the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from tqdm import tqdm

from moedist.checkpoint import RunFolder
from moedist.config import Config
from moedist.monitor.alerts import Alert
from moedist.monitor.balance import spread_evenly
from moedist.monitor.display import Display
from moedist.monitor.lines import JsonLines
from moedist.monitor.metrics import is_declared
from moedist.monitor.origin import origin
from moedist.monitor.wandb_run import WandbRun, wandb_mode
from moedist.placement import Plan

MOST_LOADS = 4096  # numbers of a line of loads.jsonl


class Recorder:
    """Records metrics, plans and alerts and shows progress on rank 0; on other ranks every call is a no-op, but for what
    `monitor.wandb_ranks` sends from each.

    Args:
        ranks: of every rank where it runs, such as "node7, cuda:1".
    """

    def __init__(self, config: Config, run: RunFolder, rank: int, total_steps: int, first_step: int = 0,
                 ranks: Sequence[str] = ()):
        self.active, self.total, self.ranks = rank == 0, total_steps, list(ranks)
        self._tokens = config.train.batch * config.data.sequence_length
        self._file = self._loads = self._plans = self._wandb = self._display = None
        mode = wandb_mode(config.monitor)
        facts = {**origin(), "devices": self.ranks, "run_folder": str(run.path)}
        if self.active:
            self._display = Display(config.monitor.output, total_steps, first_step)
            self._file, self._loads, self._plans = (JsonLines(path, self.say) for path in
                                                    (run.metrics_file, run.loads_file, run.plans_file))
            if mode != "disabled":
                self._wandb = WandbRun(config, run, mode, facts, self.say)
        elif config.monitor.wandb_ranks and mode != "disabled":
            self._wandb = WandbRun(config, run, mode, facts, self.say, rank)

    def rank_name(self, rank: int) -> str:
        """rank 3 (node7, cuda:1)"""
        return f"rank {rank} ({self.ranks[rank]})" if rank < len(self.ranks) else f"rank {rank}"

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            self._display.say(text)

    def tick(self, step: int, phase: str = "", facts: Mapping[str, str] | None = None) -> None:
        """Move the progress bar, if there is one."""
        if self.active:
            self._display.tick(step, phase, facts or {})

    def bar(self, **options: Any) -> tqdm:
        """A progress bar for something beside the steps; silent where it is not a terminal, and on other ranks."""
        return self._display.bar(**options) if self.active else tqdm(**{**options, "disable": True})

    def eta(self, step: int) -> str:
        """Time left at the mean pace so far, as h:mm:ss."""
        return self._display.eta(step) if self.active else ""

    def record(self, step: int, values: Mapping[str, float | str], line: str | None = None) -> None:
        """Write metrics of `step` (all declared in `METRICS`) everywhere, and `line` for people."""
        if not self.active:
            return
        values = finite(values)
        self._file.write({"step": step, **values})
        if self._wandb is not None:
            self._wandb.log(step, {name: value for name, value in values.items() if value is not None})
        self._display.metrics(step, values, line)

    def record_rank(self, step: int, values: Mapping[str, float]) -> None:
        """Send what this rank, not rank 0, did to its own Weights & Biases run, if it has one."""
        if not self.active and self._wandb is not None:
            self._wandb.log(step, values)

    def record_loads(self, step: int, sums: Mapping[int, torch.Tensor]) -> None:
        """Write rows of every expert since the last time, [E] by layer; of so many layers that a line stays short."""
        if self.active and sums:
            most = max(1, MOST_LOADS // max(len(load_E) for load_E in sums.values()))
            loads = {i: sums[i].tolist() for i in spread_evenly(sorted(sums), most)}
            self._loads.write({"step": step, "loads": loads}, separators=(",", ":"))

    def record_plan(self, step: int, plan: Plan) -> None:
        """Add the plan in force to the run folder's list of plans."""
        if self.active:
            self._plans.write({"step": step, "plan": json.loads(plan.to_json())}, separators=(",", ":"))
            if self._wandb is not None:
                self._wandb.plan(step, plan)

    @property
    def shows_pictures(self) -> bool:
        """Whether there is somebody who shows pictures: without, they are not worth drawing."""
        return self.active and self._wandb is not None

    def record_pictures(self, step: int, paths: list[Path]) -> None:
        """Send pictures to Weights & Biases."""
        if self.active and self._wandb is not None:
            self._wandb.pictures(step, paths)

    def record_checkpoint(self, path: Path) -> None:
        """Send a complete checkpoint to Weights & Biases, where the configuration wants it."""
        if self.active and self._wandb is not None:
            self._wandb.checkpoint(path)

    def alert(self, step: int, alert: Alert) -> None:
        """Tell people, the JSONL and Weights & Biases that something wants looking at."""
        if self.active:
            self._file.write({"step": step, "alert": alert.kind, "text": alert.text})
            self._display.alert(step, alert.kind, alert.text)
            if self._wandb is not None:
                self._wandb.alert(alert.kind, alert.text, alert.fatal)

    def close(self) -> None:
        for file in (self._file, self._loads, self._plans):
            if file is not None:
                file.close()
        if self._display is not None:
            self._display.close()
        if self._wandb is not None:
            self._wandb.finish()


def finite(values: Mapping[str, float | str]) -> dict[str, float | str | None]:
    """What a line of metrics.jsonl holds of metrics, which must be declared in `METRICS`: None for what is not finite, for
    which JSON has no word."""
    undeclared = [name for name in values if not is_declared(name)]
    assert not undeclared, f"metrics without a declaration: {sorted(undeclared)}"
    return {name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in values.items()}
