"""Rank 0's outlet: JSONL in the run folder, Weights & Biases, a progress bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import sys
import time
from typing import Any

from tqdm import tqdm

from moedist.checkpoint import RunFolder
from moedist.config import Config, MonitorConfig
from moedist.errors import ConfigError
from moedist.monitor.metrics import is_declared


class Recorder:
    """Records metrics and shows progress on rank 0; on other ranks every call is a no-op."""

    def __init__(self, config: Config, run: RunFolder, is_main: bool, total_steps: int, first_step: int = 0):
        self.active, self.total = is_main, total_steps
        self._started, self._first = time.monotonic(), first_step
        self._file = self._wandb = self._bar = None
        if is_main:
            self._file = open(run.metrics_file, "a", encoding="utf-8", buffering=1)  # a line is on disk when it is written
            self._wandb = start_wandb(config, run)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.active:
            if self._bar is not None:
                self._bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def tick(self, step: int) -> None:
        """Move the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def bar(self, **options: Any) -> tqdm:
        """A progress bar for something beside the steps; silent where it is not a terminal, and on other ranks."""
        shown = self.active and sys.stderr.isatty()
        return tqdm(**{**options, "disable": not shown})

    def record(self, step: int, values: dict[str, float], line: str | None = None) -> None:
        """Write metrics of `step` (all declared in `METRICS`) everywhere, and `line` for people."""
        if not self.active:
            return
        self._file.write(metrics_line(step, values))
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if line:
            self.say(line)

    def eta(self, step: int) -> str:
        """Time left at the mean pace so far, as h:mm:ss."""
        done = step - self._first
        left = (time.monotonic() - self._started) / max(done, 1) * (self.total - step)
        return f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()


def metrics_line(step: int, values: dict[str, float]) -> str:
    """A line of metrics.jsonl; all are declared in `METRICS`."""
    undeclared = [name for name in values if not is_declared(name)]
    assert not undeclared, f"metrics without a declaration: {sorted(undeclared)}"
    return json.dumps({"step": step, **values}) + "\n"


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


def start_wandb(config: Config, run: RunFolder) -> Any:
    """The W&B run of this folder, continued where there was one; None when disabled."""
    mode = wandb_mode(config.monitor)
    if mode == "disabled":
        return None
    import dataclasses

    import wandb  # seconds to import, so only when used

    id_file = run.path / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=mode == "offline")
    try:
        started = wandb.init(project=config.monitor.project, group=config.monitor.group, name=run.path.name, mode=mode,
                             id=id_file.read_text(encoding="utf-8").strip(), resume="allow", dir=str(run.path),
                             config=dataclasses.asdict(config), settings=settings)
    except wandb.Error as error:
        raise ConfigError(f"Weights & Biases cannot start ({mode}): {' '.join(str(error).split())[:200]}; set "
                          "monitor.wandb=offline or monitor.wandb=disabled") from error
    started.define_metric("*", step_metric="train/tokens")
    return started
