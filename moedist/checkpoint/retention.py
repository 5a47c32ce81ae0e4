"""The folder of checkpoints: a new one takes its place in one stroke, old ones go, and what a kill left behind is mended.

    step-00000100        a whole checkpoint            step-00000100.old      it, while another of that step takes its place
    step-00000100.part   being written, or being       step-00000100.damaged  one that could not be read, set aside when a run
                         removed: never read                                  went on from an older one; nobody removes it
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Mapping

from moedist.checkpoint.parts import sync_folder
from moedist.run_folder import RunFolder
from moedist.checkpoint.store import read_meta
from moedist.errors import CheckpointError


def to_keep(losses: Mapping[int, float | None], keep: int, keep_best: int) -> set[int]:
    """Steps to keep: the newest, and those of lowest validation loss.

    Args:
        losses: step -> validation loss, None where it was not evaluated.

    >>> sorted(to_keep({10: 2.5, 20: 2.1, 30: 2.3, 40: None, 50: 2.4}, keep=2, keep_best=1))
    [20, 40, 50]
    """
    newest = sorted(losses)[-keep:]
    evaluated = sorted((loss, step) for step, loss in losses.items() if loss is not None)
    return {*newest, *(step for _, step in evaluated[:keep_best])}


def mend(run: RunFolder) -> None:
    """Remove what was never finished, and give a checkpoint its name back whose successor never came."""
    if not run.checkpoints.is_dir():
        return
    for path in sorted(run.checkpoints.iterdir()):
        final = path.with_suffix("")
        if path.suffix == ".old" and not final.exists():
            path.rename(final)
        elif path.suffix in (".part", ".old"):
            shutil.rmtree(path)


def put_in_place(part: Path) -> Path:
    """Give a finished folder its final name; at any moment, that step's checkpoint is there under one of its names."""
    final = part.with_suffix("")
    if final.exists():  # the same step saved again, after a compression
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        part.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(final)
        sync_folder(final.parent)
    return final


def remove_others(run: RunFolder, keep: int, keep_best: int) -> None:
    """Remove all checkpoints but those to keep."""
    losses: dict[int, float | None] = {}
    for step in run.steps():
        try:
            losses[step] = read_meta(run.checkpoint(step)).get("valid_loss")
        except CheckpointError:  # damaged: it counts by its age alone
            losses[step] = None
    for step in losses.keys() - to_keep(losses, keep, keep_best):
        path = run.checkpoint(step)
        gone = path.with_name(path.name + ".part")  # half removed, it must not look whole
        try:
            path.rename(gone)
        except OSError:  # it stays: too many checkpoints are no reason to end a run
            continue
        shutil.rmtree(gone, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Take a damaged checkpoint out of the way: it would count among the newest to keep."""
    target = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if target.exists():
        shutil.rmtree(target)
    checkpoint.rename(target)
