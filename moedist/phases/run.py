"""Everything a phase works on: the parts of a run and where it stands."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch

from moedist.checkpoint import RunFolder, Saver
from moedist.config import Config
from moedist.coordinator import Coordinator, RankTimes, migrate, plan_again
from moedist.data import EvalStream, TrainStream
from moedist.engine import Engine
from moedist.errors import CheckpointError
from moedist.model import Batch, ExpertForm, Transformer
from moedist.monitor import Recorder
from moedist.phases.evaluation import HeldOut
from moedist.phases.watch import Watch
from moedist.placement import Plan, moved_placements, split_batch
from moedist.routing import mix_seeds
from moedist.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def weight_dtype(config: Config) -> torch.dtype:
    """Weights are float32, or float64 where the run is; lower precisions are for activations."""
    return torch.float64 if config.train.dtype == "float64" else torch.float32


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint.

    Attributes:
        step: optimizer steps done.
        sequences: training sequences read, over all ranks: the exact position in the data.
        phase, phase_step: entry of the schedule and steps done in it.
    """

    step: int = 0
    sequences: int = 0
    phase: int = 0
    phase_step: int = 0


@dataclass
class Run:
    """The parts of a run. Made by `moedist.trainer`, handed to every phase."""

    config: Config
    world: World
    folder: RunFolder
    plan: Plan
    coordinator: Coordinator
    model: Transformer
    engine: Engine
    train_stream: TrainStream
    valid_stream: EvalStream
    recorder: Recorder
    corpus_digest: str
    progress: Progress = field(default_factory=Progress)
    held_out: HeldOut | None = None  # the newest evaluation
    evaluated_at: int | None = None  # the step that it is of
    signals: "Signals" = field(default_factory=lambda: Signals())
    saver: Saver = field(init=False)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.folder, self.world, self.config.checkpoint.keep, self.config.checkpoint.keep_best)
        self.watch = Watch(self)

    @property
    def tokens_read(self) -> int:
        """Training tokens since the start, over all ranks: the x-axis of every metric."""
        return self.progress.sequences * self.config.data.sequence_length

    @property
    def phase_name(self) -> str:
        """train 1/3"""
        i = min(self.progress.phase, len(self.config.phases) - 1)
        return f"{next(iter(self.config.phases[i]))} {i + 1}/{len(self.config.phases)}"

    def batches(self, step: int, sequences: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """This rank's part of every forward pass of a step, and its targets.

        Args:
            step: steps done before it; sequences: training sequences read before it.
        """
        config, length = self.config, self.config.data.sequence_length
        part = config.train.batch // config.train.accumulate
        counts = split_batch(part, self.plan.batch_shares)
        offset, mine = sum(counts[:self.world.rank]), counts[self.world.rank]
        torch.manual_seed(mix_seeds(config.seed, step, self.world.rank))  # dropout: a resumed run draws the same
        for first in range(offset, config.train.batch + offset, part):
            inputs, targets = self.train_stream.batch(sequences + first, mine)
            keys = torch.arange(first, first + mine).unsqueeze(1) * length + torch.arange(length)
            yield Batch(inputs, keys, mix_seeds(config.seed, step)), targets

    def batches_before(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Those of the step that was just done."""
        return self.batches(self.progress.step - 1, self.progress.sequences - self.config.train.batch)

    def record(self, values: dict[str, float | str], line: str | None = None) -> None:
        """Record metrics of the step that the run stands at, and `line` for people."""
        self.recorder.record(self.progress.step, {"train/tokens": float(self.tokens_read), **values}, line)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return DTYPES[self.config.train.dtype]

    @property
    def low_precision(self) -> bool:
        """Whether activations have 16 bits."""
        return self.dtype in (torch.bfloat16, torch.float16)

    def save(self, again: bool = False, periodic: bool = False) -> None:
        """Write a checkpoint of where the run stands, unless there is one (`again`: then too). Every rank must call it.

        Args:
            periodic: one of many: it is written while training goes on, and a failure is told but does not end the run.

        Raises:
            CheckpointError: one that is not periodic could not be written.
        """
        step, c = self.progress.step, self.config.checkpoint
        if periodic and not again and self.saver.step == step:
            return
        failure = self.saver.finish()  # before looking at the folder: its step may be this one
        if again or not self.world.broadcast_object(step in self.folder.steps()):
            meta: dict[str, Any] = {
                "progress": dict(vars(self.progress)), "counters": self.engine.counters(), "plan": self.plan.to_json(),
                "coordinator": self.coordinator.state(), "corpus": self.corpus_digest, "world_size": self.world.size,
                "valid_loss": self.held_out.loss if self.held_out and self.evaluated_at == step else None,
            }
            background = periodic and c.asynchronous
            self.saver.start(step, self.engine.named_tensors(), meta, background)
            failure = None if background else self.saver.finish()
        self._tell_saves()
        if failure and not periodic:
            raise CheckpointError(failure)

    def saving(self, all_written: bool) -> None:
        """Between two steps: see to a checkpoint that is being written. Every rank must call it.

        Args:
            all_written: that all ranks have written their parts, as the step's flags say.
        """
        if all_written:
            self.saver.commit()
        self._tell_saves()

    def finish_saving(self) -> str | None:
        """Wait for a checkpoint that is being written. Every rank must call it; returns why it failed, if it did."""
        failure = self.saver.finish()
        self._tell_saves()
        return failure

    def _tell_saves(self) -> None:
        for saved in self.saver.news():
            if saved.failure:
                self.recorder.say(f"warning: {saved.failure}")
                continue
            self.watch.checkpoint_bytes = saved.bytes
            self.recorder.record_checkpoint(saved.path)
            self.record({
                "checkpoint/blocked_ms": 1e3 * saved.blocked_s, "checkpoint/seconds": saved.seconds,
                "checkpoint/bytes": saved.bytes}, f"checkpoint {saved.path}")

    def replan(self, loads: dict[int, torch.Tensor], ranks: RankTimes, ready: bool) -> None:
        """Let the coordinator learn from a step, take up a plan that is ready, and look for another when it is time.

        Args:
            ready: that of all ranks: rank 0's coordinator said so before the step's last collective.
        """
        self.coordinator.observe(loads, ranks)
        if ready:
            plan, lines = self.coordinator.finish_replan(self.plan)
            if plan.sha256 != self.plan.sha256:
                migrate(self.world, self.engine, plan)
                self.take_up(plan)
            for line in lines:
                self.recorder.say(f"step {self.progress.step:>6}  {line}")
        every = self.config.placement.replan_every
        if every and self.progress.step % every == 0:
            self.coordinator.start_replan(self.plan)

    def experts_changed(self) -> None:
        """Experts have other forms now: measure and plan again, where the plan was measured. Every rank must call it."""
        mine = {i: {e: bank.form_of(e) for e in bank.expert_ids} for i, bank in self.model.banks.items()}
        forms: dict[int, dict[int, ExpertForm]] = {i: {} for i in mine}
        for of_rank in self.world.gather_objects(mine):
            for i, of_layer in of_rank.items():
                forms[i].update(of_layer)
        transport = next(iter(self.model.moe_layers()))[1].dispatcher.transport
        plan = plan_again(self.config, self.world, transport, self.model.embedding.num_embeddings, self.coordinator, self.plan,
                          forms, self.recorder.say)
        if plan.sha256 != self.plan.sha256:
            moved = migrate(self.world, self.engine, plan)
            self.take_up(plan)
            self.recorder.say(f"step {self.progress.step:>6}  re-plan after compression: {moved} experts moved")

    def take_up(self, plan: Plan) -> None:
        """From now on this plan is in force; experts are where it says."""
        moved, self.plan = moved_placements(self.plan, plan), plan
        self.note_plan(moved)

    def note_plan(self, moved: int = 0) -> None:
        """Record the plan in force, by which so many placements are new."""
        self.watch.plan_changed(moved)
        self.recorder.record_plan(self.progress.step, self.plan)


class Signals:
    """Remembers signals until the end of the step: SIGTERM, SIGINT and SIGUSR2 (of Slurm, ahead of a time limit) stop the run,
    SIGUSR1 saves a checkpoint."""

    STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    PATIENCE_S = 5  # Ctrl-C reaches a rank twice: from the terminal, and handed on by torchrun

    def __init__(self) -> None:
        self.stop: str | None = None
        self.save = False
        self._stopped_at = 0.0

    def listen(self) -> None:
        """Install the handlers (main thread only). Another SIGINT, `PATIENCE_S` after the first, kills at once."""
        for number in self.STOP:
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGUSR1, self._on_save)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # a task of Slurm has held it back until here

    def _on_stop(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.stop is None:
            self.stop, self._stopped_at = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._stopped_at > self.PATIENCE_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    def _on_save(self, *_: Any) -> None:
        self.save = True
