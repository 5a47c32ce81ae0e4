"""Write checkpoints while training goes on.

A save copies what this rank writes to host memory, and a thread writes the copy. That thread talks to no other rank: a
collective of its own would wait for ranks that have died, or run out of time on a slow disk, out of reach of the error
handling of the steps. What ranks must agree on, they agree on between steps, in collectives that training makes anyway: once
the flags of a step say that all parts are written, rank 0 gathers where everything is, and a thread there makes the
parts a checkpoint. One write is in flight at most.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

import torch

from moedist.checkpoint.buffers import HostBuffers
from moedist.checkpoint.parts import Part, join_parts, share, write_part
from moedist.checkpoint.retention import mend, put_in_place, remove_others
from moedist.run_folder import RunFolder
from moedist.checkpoint.store import first_cause
from moedist.errors import CheckpointError
from moedist.world import World

WAIT_S = 1.0  # ranks that wait for a write meet so often: a slow disk is no silent rank


@dataclass(frozen=True)
class Saved:
    """What became of a save, on rank 0.

    Attributes:
        failure: why there is no checkpoint, None where there is.
        bytes: of all ranks; blocked_s: that training stood still on rank 0; seconds: until it was complete.
    """

    path: Path
    failure: str | None
    bytes: int
    blocked_s: float
    seconds: float


class Saver:
    """Saves the checkpoints of a run. Every rank has one, and calls `start`, `commit` and `finish` in the same order."""

    def __init__(self, run: RunFolder, world: World, keep: int, keep_best: int = 0):
        self.run, self.world, self.keep, self.keep_best = run, world, keep, keep_best
        self.step: int | None = None  # of the newest save that was started
        self._buffers = HostBuffers(world.device)
        self._writing: _Task | None = None  # on every rank, or on none
        self._joining: _Task | None = None  # on every rank (elsewhere than on rank 0 with nothing to do), or on none
        self._agreed: tuple[str, list[str]] | None = None  # who writes what, and of which holdings
        self._failure: str | None = None
        self._news: list[Saved] = []

    def start(self, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], background: bool) -> None:
        """Write a checkpoint of `step`; in the background, the tensors may change when this returns. Collective.

        Args:
            tensors: what this rank holds, by global name; names held by several ranks must have equal contents.
            meta: JSON-able facts, of rank 0.
        """
        began = time.perf_counter()
        self.finish()
        self.step, self._failure, self._began = step, None, began
        final = self.run.checkpoints / f"step-{step:08d}"
        self._meta, self._part = dict(meta), final.with_name(final.name + ".part")
        unwritable = self._make_folder() if self.world.is_main else None
        mine = {name: tensors[name] for name in self._share(tensors)}  # its collective comes after the folder is made
        if background:
            mine = self._buffers.copy(mine)
        self._writing = _Task(lambda: _written(self._part, self.world, mine, unwritable))
        self._blocked_s = time.perf_counter() - began

    @property
    def written(self) -> bool:
        """Whether this rank's part of a save is written, and nobody has called `commit` yet."""
        return self._writing is not None and self._writing.done

    def commit(self) -> None:
        """Make the parts a checkpoint, all of which are written. Collective, and short."""
        began = time.perf_counter()
        found = self.world.gather_to_main(self._writing.result())
        self._writing, self._joining = None, _Task(lambda: self._join(found)) if self.world.is_main else _Task()
        self._blocked_s += time.perf_counter() - began

    def finish(self) -> str | None:
        """Wait until nothing is in flight. Collective; returns why the newest save has failed, None where it has not."""
        if self._writing is not None:
            self._wait(self._writing)
            self.commit()
        if self._joining is not None:
            self._wait(self._joining)
            self._joining = None
            self._failure = self.world.broadcast_object(self._failure)
        return self._failure

    def news(self) -> list[Saved]:
        """What has become of saves since the last call; on rank 0."""
        found, self._news = self._news, []
        return found

    def _make_folder(self) -> str | None:
        try:
            mend(self.run)
            self._part.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return None

    def _share(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """The names that this rank writes; agreed anew only where some rank holds something else than before."""
        holdings = {name: t.numel() * t.element_size() for name, t in tensors.items()}
        digest = hashlib.sha256(json.dumps(sorted(holdings.items())).encode()).hexdigest()
        if not all(self.world.gather_objects(self._agreed is not None and self._agreed[0] == digest)):
            self._agreed = digest, share(self.world.gather_objects(holdings))[self.world.rank]
        return self._agreed[1]

    def _join(self, parts: list[Part | str]) -> None:
        """On rank 0: the parts become a checkpoint, and older ones make room."""
        failures = [part for part in parts if isinstance(part, str)]
        failure, path = failures[0] if failures else None, self._part
        if failure is None:
            try:
                join_parts(self._part, parts, self._meta)
                path = put_in_place(self._part)
                remove_others(self.run, self.keep, self.keep_best)
            except Exception as error:  # of any kind: it must be told, not lost with the thread
                failure = _no_room(first_cause(error), self._part)
        if failure is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            self._failure = f"could not write {self._part.with_suffix('')}: {failure}; the checkpoints before it are untouched"
        total = sum(part.bytes for part in parts if isinstance(part, Part))
        self._news.append(Saved(path, self._failure, total, self._blocked_s, time.perf_counter() - self._began))

    def _wait(self, task: "_Task") -> None:
        """Until every rank's task is done."""
        pause = 0.002
        while True:
            task.wait(pause)
            left = torch.tensor([0 if task.done else 1])
            if not self.world.all_reduce_(left).item():
                return
            pause = min(WAIT_S, 2 * pause)


def save_checkpoint(run: RunFolder, step: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any], world: World,
                    keep: int, keep_best: int = 0) -> Path:
    """Write one checkpoint and wait for it, then remove all but the `keep` newest and the `keep_best` best. Collective.

    Raises:
        CheckpointError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    saver = Saver(run, world, keep, keep_best)
    saver.start(step, tensors, meta, background=False)
    if failure := saver.finish():
        raise CheckpointError(failure)
    return run.checkpoint(step)


def _written(folder: Path, world: World, tensors: Mapping[str, torch.Tensor], unwritable: str | None) -> Part | str:
    """This rank's part, or why it could not be written."""
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        if unwritable is None:
            return write_part(folder, world.rank, tensors)
        cause = unwritable
    except Exception as error:  # of any kind: the other ranks must hear of it
        cause = first_cause(error)
    return _no_room(f"rank {world.rank}, {needed / 2**20:.1f} MiB to write: {cause}", folder)


def _no_room(cause: str, folder: Path) -> str:
    """A failure, with how much room there is."""
    try:
        return f"{cause} ({shutil.disk_usage(folder.parent).free / 2**20:.1f} MiB are free there now)"
    except OSError:
        return cause


class _Task:
    """Work in a thread of its own, with its result; none is done at once."""

    def __init__(self, work: Callable[[], Any] | None = None):
        self._result: Any = None
        # daemon: a rank that ends by an error does not wait for its disk
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="checkpoint") if work else None
        if self._thread is not None:
            self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        self._result = work()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def result(self) -> Any:
        self.wait(None)
        return self._result
