"""Write and read one checkpoint with torch.distributed.checkpoint.

Tensors are keyed by global names (`layers.3.experts.17.w1`, `optimizer.exp_avg.embedding.weight`). Every rank offers what
it holds: replicated tensors are written once, an expert's by its owner, and a reader of any world asks for the names it
needs. A checkpoint is written beside its final name and renamed when complete, so a partial one is never the newest.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from moedist.checkpoint.run_folder import RunFolder
from moedist.errors import CheckpointError
from moedist.world import World

META = "meta.json"


def save_checkpoint(run: RunFolder, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], world: World,
                    keep: int) -> Path:
    """Write a checkpoint of `step`, then remove all but the `keep` newest. Every rank must call it.

    Args:
        tensors: what this rank holds, by global name; names held by several ranks must have equal contents.
        meta: JSON-able facts, written by rank 0.

    Raises:
        CheckpointError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    dcp, checkpoint_exception = _library()
    final = run.checkpoint(step)
    part = final.with_name(final.name + ".part")
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    world.barrier()
    try:
        with _quiet():
            dcp.save(dict(tensors), checkpoint_id=str(part), process_group=world.control, no_dist=world.size == 1)
        if world.is_main:
            (part / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            if final.exists():  # the same step saved again, after a resume or a compression
                old = final.with_name(final.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)  # removed when the new one is in place
                part.rename(final)
                shutil.rmtree(old)
            else:
                part.rename(final)
            for old in run.steps()[:-keep]:
                shutil.rmtree(run.checkpoint(old))
    except (OSError, RuntimeError, checkpoint_exception) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {_first_cause(error)}; free some space (the previous checkpoint "
                              "is untouched) and resume") from error
    world.barrier()
    return final


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The facts saved beside the tensors.

    Raises:
        CheckpointError: there is no complete checkpoint in this folder.
    """
    try:
        return json.loads((checkpoint / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint ({error}); remove it to use an older one") from error


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that a checkpoint holds, whichever rank wrote it.

    Raises:
        CheckpointError: its index is damaged.
    """
    dcp, _ = _library()
    try:
        with _quiet():
            stored = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever pickle makes of a damaged index
        raise CheckpointError(f"{checkpoint} cannot be read ({_first_cause(error)}); remove it to use an older "
                              "one") from error
    return {name: tuple(tensor.size) for name, tensor in stored.items()}


def load_checkpoint(checkpoint: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill `tensors` in place from a checkpoint, whatever world wrote it. Every rank must call it.

    Raises:
        CheckpointError: a name is missing, a shape differs (a checkpoint of another model), or a file is damaged.
    """
    dcp, checkpoint_exception = _library()
    stored = stored_shapes(checkpoint)
    for name, tensor in tensors.items():
        if name not in stored:
            raise CheckpointError(f"{checkpoint} has no {name!r}: it is of another model; resume with its own config.yaml")
        if stored[name] != tuple(tensor.shape):
            raise CheckpointError(f"{checkpoint} has {name!r} of shape {stored[name]}, this model {tuple(tensor.shape)}: it "
                                  "is of another model; resume with its own config.yaml")
    with _quiet():
        try:
            dcp.load(dict(tensors), checkpoint_id=str(checkpoint), process_group=world.control, no_dist=world.size == 1)
        except (OSError, RuntimeError, checkpoint_exception) as error:
            raise CheckpointError(f"{checkpoint} cannot be read ({_first_cause(error)}); remove it to use an older "
                                  "one") from error


def _library() -> tuple[Any, type[BaseException]]:
    """torch.distributed.checkpoint and its exception, imported when used: it brings a second of other modules."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    return dcp, CheckpointException


class _quiet(warnings.catch_warnings):
    """torch.distributed.checkpoint warns about plain tensors and a missing process group; both are meant here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.getLogger("torch.distributed").level
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)

    def __exit__(self, *args: Any) -> None:
        logging.getLogger("torch.distributed").setLevel(self._level)
        super().__exit__(*args)


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, trace)
    if failures:
        rank, (cause, *_) = next(iter(failures.items()))
        return f"rank {rank}: {' '.join(str(cause).split())}"
    return " ".join(str(error).split())[:300]
