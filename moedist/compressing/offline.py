"""Compress the experts of a run's checkpoint; the result is a run of its own, which can be evaluated and trained on."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any, Sequence

from moedist.checkpoint import RunFolder, read_meta
from moedist.config import CompressConfig, Config, check_config, for_ranks
from moedist.coordinator import equal_plan
from moedist.errors import CheckpointError
from moedist.phases import check_methods, compress_phase
from moedist.phases.run import Progress
from moedist.trainer import build_run
from moedist.world import World, find_launch


def compress_run(run_folder: str, c: CompressConfig, overrides: Sequence[str] = (), step: int | None = None,
                 name: str | None = None) -> RunFolder:
    """Write a new run folder that holds a checkpoint with compressed experts, optimizer state included.

    Its schedule is that of the run with the compression put in where the checkpoint stands, so `train --resume` goes on
    behind it with what was left to do; more train phases may be added by an override of `phases`.

    Args:
        step: the checkpoint to take (None: the newest).
        name: of the new run (None: that of the old and the method).

    Raises:
        CheckpointError, ConfigError, CompressError.
    """
    old, size = RunFolder(run_folder), find_launch().size
    checkpoint = old.of_step(step)
    meta = read_meta(checkpoint)
    config, at = with_compression(for_ranks(old.config(list(overrides)), size)[0], Progress(**meta["progress"]), c)
    config = dataclasses.replace(config, name=name or f"{config.name}-{c.method}")
    check_config(config, size)
    check_methods(config)
    with World.start(config.world) as world:
        run = build_run(config, world, equal_plan(config, world.size), None, checkpoint, meta)
        if world.is_main:  # what became of neurons in compressions before this one
            for path in old.path.glob("compression-*"):
                shutil.copy(path, run.folder.path)
        try:
            run.progress.phase, run.progress.phase_step = at, 0
            compress_phase(run, config.phases[at]["compress"])
        finally:
            run.recorder.close()
        return run.folder


def with_compression(config: Config, progress: Progress, c: CompressConfig) -> tuple[Config, int]:
    """The configuration with a compress phase where the run stands, cutting a train phase in two if it must; its index.

    >>> config, at = with_compression(Config(phases=[{"train": 300}]), Progress(200, 0, 0, 200), CompressConfig(ratio=0.5))
    >>> at, [list(phase)[0] for phase in config.phases], config.phases[2]
    (1, ['train', 'compress', 'train'], {'train': 100})
    """
    defaults = CompressConfig()
    written: dict[str, Any] = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)
                               if getattr(c, f.name) != getattr(defaults, f.name) or f.name == "method"}
    phases = list(config.phases)
    at, done = progress.phase, progress.phase_step
    if at < len(phases) and done:
        if "train" not in phases[at]:
            raise CheckpointError(f"the checkpoint stands {done} steps inside phase {at}, {phases[at]!r}")
        left = int(phases[at]["train"]) - done
        phases[at:at + 1] = [{"train": done}, *([{"train": left}] if left > 0 else [])]
        at += 1
    phases.insert(at, {"compress": written})
    return dataclasses.replace(config, phases=phases), at
