"""Weights & Biases: one run of theirs for a run folder, continued whenever that goes on; optionally one more for each rank.

Everything goes to it by `WandbRun`; imported when a run starts, since wandb takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import netrc
import os
import re
import secrets
from pathlib import Path
from typing import Any, Callable, Mapping

from moedist.checkpoint import RunFolder
from moedist.config import Config, MonitorConfig
from moedist.errors import ConfigError
from moedist.placement import Plan

MOST_ROWS = 4096  # of a table: the page of a run shows no more


def wandb_mode(config: MonitorConfig) -> str:
    """online, offline or disabled; `auto` goes online only where a key is set, and $WANDB_MODE is obeyed."""
    if config.wandb != "auto":
        return config.wandb
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        return "online" if netrc.netrc().authenticators("api.wandb.ai") else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def wandb_group(config: Config) -> str:
    """The group of a run: as configured, else that of the sweep or the environment, else the run's name."""
    return config.monitor.group or os.environ.get("WANDB_RUN_GROUP") or os.environ.get("WANDB_SWEEP_ID") or config.name


def _outlived(method: Callable[..., None]) -> Callable[..., None]:
    """A training outlives Weights & Biases, whose process may be gone: Slurm sends signals that are meant for ranks to it too."""
    @functools.wraps(method)
    def call(self: "WandbRun", *args: Any) -> None:
        if self._lost:
            return
        try:
            method(self, *args)
        except Exception as error:  # whatever it is, it is no reason to lose a training
            self._lost = True
            self._say(f"warning: Weights & Biases is gone ({type(error).__name__}: {' '.join(str(error).split())[:100]}); metrics "
                      "go on in metrics.jsonl alone")
    return call


class WandbRun:
    """A run in Weights & Biases. Where that fails on the way, it is told once, and nothing more is sent.

    Args:
        facts: what is worth knowing beside the configuration: devices, commit.
        say: is told when Weights & Biases is gone.
        rank: None for the run of all ranks; else of that rank alone, which is grouped by the run folder.

    Raises:
        ConfigError: it cannot start.
    """

    def __init__(self, config: Config, run: RunFolder, mode: str, facts: Mapping[str, Any], say: Callable[[str], None],
                 rank: int | None = None):
        import wandb
        self._say, self._lost = say, False
        self._wandb, self._artifacts = wandb, config.monitor.artifacts and rank is None
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=mode == "offline")
        name = run.path.name if rank is None else f"{run.path.name}-rank{rank}"
        try:
            self._run = wandb.init(
                project=config.monitor.project, group=wandb_group(config) if rank is None else run.path.name, name=name,
                mode=mode, id=_run_id(run) if rank is None else re.sub(r"[^\w-]", "-", name), resume="allow",
                job_type="train" if rank is None else "rank", dir=str(run.path), settings=settings,
                config={**dataclasses.asdict(config), **facts})
        except wandb.Error as error:
            raise ConfigError(f"Weights & Biases cannot start ({mode}): {' '.join(str(error).split())[:200]}; set "
                              "monitor.wandb=offline or monitor.wandb=disabled") from error
        self._run.define_metric("train/tokens", hidden=True)
        self._run.define_metric("*", step_metric="train/tokens")

    @property
    def id(self) -> str:
        return self._run.id

    @_outlived
    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Values of a step; several calls for one step add up. What is not finite is left out."""
        self._run.log({k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}, step=step)

    @_outlived
    def plan(self, step: int, plan: Plan) -> None:
        """A table of who owns what: layer, expert, ranks and their shares of its rows, and one of the ranks."""
        rows = [[i, e, ", ".join(map(str, ranks)), ", ".join(f"{share:.3f}" for share in shares)]
                for i, layer in plan.layers for e, (ranks, shares) in enumerate(zip(layer.owners, layer.shares))]
        ranks = [[r, sum(len(layer.experts_of_rank(r)) for _, layer in plan.layers), share,
                  plan.speeds[r] if plan.speeds else None, plan.predicted_ms[r] if plan.predicted_ms else None]
                 for r, share in enumerate(plan.batch_shares)]
        table = self._wandb.Table
        self.log(step, {
            "plan/owners": table(["layer", "expert", "ranks", "shares"], rows[:MOST_ROWS]),
            "plan/ranks": table(["rank", "experts", "batch share", "rows/s", "predicted ms"], ranks[:MOST_ROWS])})

    @_outlived
    def pictures(self, step: int, paths: list[Path]) -> None:
        """Pictures by the names of their files."""
        self.log(step, {f"pictures/{path.stem}": self._wandb.Image(str(path)) for path in paths})

    @_outlived
    def checkpoint(self, path: Path) -> None:
        """A complete checkpoint as an artifact, where the configuration wants that; its files are copied now."""
        if self._artifacts:
            artifact = self._wandb.Artifact(f"{self._run.name or self._run.id}-checkpoint", type="model",
                                            metadata={"step": path.name})
            artifact.add_dir(str(path))
            self._run.log_artifact(artifact)

    @_outlived
    def alert(self, kind: str, text: str, fatal: bool) -> None:
        """An alert, which Weights & Biases sends on as its user likes."""
        level = self._wandb.AlertLevel.ERROR if fatal else self._wandb.AlertLevel.WARN
        self._run.alert(title=kind, text=text, level=level)

    @_outlived
    def finish(self) -> None:
        self._run.finish()


def _run_id(run: RunFolder) -> str:
    """The id of the run folder; made when there is none."""
    file = run.path / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
