"""Read one checkpoint, written by any world, and write one without going on meanwhile.

Tensors are keyed by global names (`layers.3.experts.17.w1`, `optimizer.exp_avg.embedding.weight`). Replicated tensors are
written once, an expert's by its owner, and a reader of any world asks for the names it needs. All that is read is held
against the hashes that were written with it.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Callable

import torch

from moedist.checkpoint.hashes import Hashes, content_hash
from moedist.checkpoint.parts import INDEX, META
from moedist.errors import CheckpointError
from moedist.world import World


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not as it was written: an older one may be whole."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}; remove it to use an older one")
        self.reason = reason


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The facts saved beside the tensors.

    Raises:
        DamagedCheckpoint: there is no complete checkpoint in this folder.
    """
    try:
        meta = json.loads((checkpoint / META).read_text(encoding="utf-8"))
        wrong = Hashes(checkpoint).of_file(META)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{checkpoint} is not a complete checkpoint ({error})") from error
    if wrong:
        raise _unreadable(checkpoint, wrong)
    return meta


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that a checkpoint holds, whichever rank wrote it.

    Raises:
        DamagedCheckpoint: its index is damaged.
    """
    return {name: tuple(tensor.size) for name, tensor in _index(checkpoint)[0].state_dict_metadata.items()}


def check_index(checkpoint: Path, world: World) -> None:
    """Refuse a checkpoint whose small files are damaged, or whose large ones are short, on any rank. Collective.

    Raises:
        DamagedCheckpoint: on every rank.
    """
    def check() -> None:
        read_meta(checkpoint)
        ends: dict[str, int] = {}
        for stored in _index(checkpoint)[0].storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, end in ends.items():
            size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else 0
            if size < end:
                raise _unreadable(checkpoint, f"{name} has {size} bytes of {end}")

    _on_all_ranks(check, world)


def load_checkpoint(checkpoint: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill `tensors` in place from a checkpoint, and verify what was read. Every rank must call it.

    Raises:
        CheckpointError: a name is missing, or a shape differs (a checkpoint of another model).
        DamagedCheckpoint: a file is damaged. Either error comes on every rank, and says what the first rank has found.
    """
    _on_all_ranks(lambda: _load(checkpoint, tensors), world)


def _load(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    index, hashes = _index(checkpoint)
    for name, tensor in tensors.items():
        stored = index.state_dict_metadata.get(name)
        if stored is None:
            raise CheckpointError(f"{checkpoint} has no {name!r}: it is of another model; resume with its own config.yaml")
        if tuple(stored.size) != tuple(tensor.shape):
            raise CheckpointError(f"{checkpoint} has {name!r} of shape {tuple(stored.size)}, this model "
                                  f"{tuple(tensor.shape)}: it is of another model; resume with its own config.yaml")
    places = [(s.relative_path, s.offset, s.length, key.fqn) for key, s in index.storage_data.items() if key.fqn in tensors]
    for file, offset, length, name in sorted(places):  # in the order of each file
        if wrong := hashes.of_stored(name, file, offset, length):
            raise _unreadable(checkpoint, wrong)
    # a hash is of the stored precision; where the model has another, the numbers are converted afterwards
    read = {name: t if t.dtype == (dtype := index.state_dict_metadata[name].properties.dtype) else
            torch.empty_like(t, dtype=dtype) for name, t in tensors.items()}
    dcp, checkpoint_exception = _library()
    try:
        with _quiet():  # no_dist: a rank knows by itself where what it needs is
            dcp.load(dict(read), checkpoint_id=str(checkpoint), no_dist=True)
    except (OSError, RuntimeError, checkpoint_exception) as error:
        raise _unreadable(checkpoint, first_cause(error)) from error
    if wrong := hashes.of_contents({name: content_hash(t) for name, t in read.items()}):
        raise _unreadable(checkpoint, wrong)
    for name, tensor in tensors.items():
        if read[name] is not tensor:
            tensor.copy_(read[name])


def _index(checkpoint: Path) -> tuple[Any, Hashes]:
    """torch.distributed.checkpoint's index, verified, and the hashes of all."""
    dcp, _ = _library()
    try:
        hashes = Hashes(checkpoint)
        if wrong := hashes.of_file(INDEX):
            raise _unreadable(checkpoint, wrong)
        return dcp.FileSystemReader(str(checkpoint)).read_metadata(), hashes
    except DamagedCheckpoint:
        raise
    except Exception as error:  # whatever pickle makes of an index from elsewhere
        raise _unreadable(checkpoint, first_cause(error)) from error


def _unreadable(checkpoint: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{checkpoint} cannot be read: {why}")


def _on_all_ranks(work: Callable[[], None], world: World) -> None:
    """Do something on every rank; where it fails on one, the same error is raised on all: they must do the same next."""
    error = None
    try:
        work()
    except CheckpointError as found:
        error = found
    damaged = isinstance(error, DamagedCheckpoint)
    told = world.gather_objects(error and (DamagedCheckpoint if damaged else CheckpointError,
                                           error.reason if damaged else str(error)))
    for found in told:
        if found is not None:
            kind, text = found
            raise kind(text) from error


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


def first_cause(error: BaseException) -> str:
    """What went wrong first, on one line: the error that others were raised in the handling of."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (exception, trace)
    if failures:
        error = next(iter(failures.values()))[0]
    while (before := error.__cause__ or error.__context__) is not None and isinstance(before, (OSError, RuntimeError)):
        error = before
    return " ".join(str(error).split())[:300]
