"""How long a checkpoint keeps training waiting, against writing it while training waits.

A model of 100 million parameters, almost all in experts, is saved with its Adam moments (12 bytes a parameter) by both ways
in turn, and trained while the one in the background is written. Training is blocked while its state is copied to host memory,
and while ranks agree that all is written. What the writing takes from training that goes on (processor time, where training
runs on a CPU) is shown as well: it is no blocking, but it is not free.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from moedist.bench.figures import write_figures
from moedist.checkpoint import RunFolder, Saver, load_checkpoint
from moedist.checkpoint.hashes import content_hash
from moedist.config import config_from_dict
from moedist.coordinator import equal_plan
from moedist.dispatch import build_transport
from moedist.engine import build_engine
from moedist.errors import CheckpointError
from moedist.model import Batch, Transformer
from moedist.text_table import table
from moedist.world import World

CONFIG: dict[str, Any] = {
    "data": {"sequence_length": 64}, "train": {"batch": 8},
    "model": {"layers": 4, "width": 512, "heads": 8, "kv_heads": 2, "ffn_hidden": 512, "experts": 16, "top_k": 2,
              "expert_hidden": 1024},
}
VOCAB = 2048


@dataclass(frozen=True)
class Round:
    """One save by each way, of the slowest rank.

    Attributes:
        sync_s: until a save that is waited for is complete.
        blocked_s: that training stood still for one in the background; async_s: until that was complete.
        free_step_s, busy_step_s: a training step while nothing, and while a checkpoint was written.
    """

    sync_s: float
    blocked_s: float
    async_s: float
    free_step_s: float
    busy_step_s: float


class _Bench:
    """A model in training on this rank, and what saves it."""

    def __init__(self, world: World, config: Any, folder: Path):
        self.world, transport = world, build_transport(world)
        self.model = Transformer(config, VOCAB, equal_plan(config, world.size), transport, world.device, torch.float32)
        self.engine = build_engine(self.model, config, world)
        self.saver, self.number = Saver(RunFolder(folder), world, keep=1), 0
        part, length = config.train.batch // world.size, config.data.sequence_length
        keys = torch.arange(part * length).view(part, length) + world.rank * part * length
        self.batch = Batch(keys * 7919 % VOCAB, keys, 0).to(world.device)

    def step(self, written: bool = False) -> bool:
        """One training step; returns whether all ranks have set their flag."""
        hidden, _ = self.model(self.batch)
        self.engine.backward(hidden.float().square().mean())
        return self.engine.step(1e-4, torch.tensor([float(written)], dtype=torch.float64)).sums.item() == self.world.size

    def save(self, background: bool) -> None:
        self.number += 1
        self.saver.start(self.number, self.engine.named_tensors(), {}, background)

    def round(self) -> Round:
        self.world.barrier()
        start = time.perf_counter()
        self.save(background=False)
        self._finish()
        sync_s = time.perf_counter() - start
        free = self._timed_steps(3)
        self.world.barrier()
        start = time.perf_counter()
        self.save(background=True)
        blocked_s, busy = time.perf_counter() - start, []
        while True:
            began = time.perf_counter()
            all_written = self.step(self.saver.written)
            busy.append(time.perf_counter() - began)
            if all_written:
                break
        began = time.perf_counter()
        self.saver.commit()
        blocked_s += time.perf_counter() - began
        self._finish()
        mine = torch.tensor([sync_s, blocked_s, time.perf_counter() - start, statistics.median(free), statistics.median(busy)],
                            dtype=torch.float64)
        return Round(*self.world.all_reduce_(mine, "max").tolist())

    def load_s(self) -> float:
        """Seconds to read all back, hashes verified."""
        self.world.barrier()
        start = time.perf_counter()
        load_checkpoint(self.saver.run.newest(), self.engine.named_tensors(), self.world)
        return time.perf_counter() - start

    def hash_s(self) -> float:
        """Seconds that one rank needs to hash the contents of all it holds."""
        tensors = self.engine.named_tensors()
        start = time.perf_counter()
        for tensor in tensors.values():
            content_hash(tensor)
        return time.perf_counter() - start

    def _timed_steps(self, n: int) -> list[float]:
        found = []
        for _ in range(n):
            start = time.perf_counter()
            self.step()
            found.append(time.perf_counter() - start)
        return found

    def _finish(self) -> None:
        if failure := self.saver.finish():
            raise CheckpointError(failure)


def bench_checkpoint(rounds: int, folder: str | None, json_path: str | None) -> dict[str, float]:
    """Measure and print, on as many ranks as it is started on.

    Args:
        folder: where to write (None: here); needs room for two checkpoints of 1.2 GB.

    Returns:
        `checkpoint.async_blocking_fraction` and what it is made of, medians over rounds.

    Raises:
        CheckpointError: there is no room.
    """
    config = config_from_dict(CONFIG)
    with World.start(config.world) as world:
        made = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder or ".") if world.is_main else None
        where = Path(world.broadcast_object(made))
        try:
            bench = _Bench(world, config, where)
            bench.step()
            first = bench.round()  # makes the buffers, which later rounds use again
            found = [bench.round() for _ in range(rounds)]
            load_s, hash_s = bench.load_s(), bench.hash_s()
        finally:
            if world.is_main:
                shutil.rmtree(where, ignore_errors=True)
        mine = sum(p.numel() for bank in bench.model.banks.values() for p in bank.parameters())
        experts = int(world.all_reduce_(torch.tensor([mine])))
        parameters = experts + bench.engine.dense_size
        sync_s, blocked_s, async_s, free_s, busy_s = map(statistics.median, zip(*map(astuple, found)))
        figures = {"async_blocking_fraction": statistics.median(r.blocked_s / r.sync_s for r in found),
                   "first_blocking_fraction": first.blocked_s / first.sync_s, "sync_s": sync_s, "async_blocked_s": blocked_s,
                   "async_s": async_s, "mb_per_s": 12e-6 * parameters / sync_s, "hash_s": hash_s, "load_s": load_s,
                   "step_slowdown_while_writing": busy_s / free_s}
        figures = {f"checkpoint.{name}": value for name, value in figures.items()}
        if world.is_main:
            print(f"{parameters:,} parameters, {experts:,} of them in experts, with Adam moments {12e-6 * parameters:,.0f} MB; "
                  f"{world.size} rank(s), median of {rounds} rounds")
            print(table(["checkpoint", "seconds", "training blocked"], [
                ["waited for", f"{sync_s:.2f}", f"{sync_s:.2f}"], ["in the background", f"{async_s:.2f}", f"{blocked_s:.3f}"],
                ["in the background, the first", f"{first.async_s:.2f}", f"{first.blocked_s:.3f}"]]))
            for name, value in figures.items():
                print(f"  {name} {value:.3g}")
            write_figures(figures, json_path)
        return figures
