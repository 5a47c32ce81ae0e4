"""Trainings that go on side by side in one run, to be compared: some steps of one, some of the other."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from moedist.phases import Run
from moedist.phases.train import StepReport, train_step
from moedist.world import World


@dataclass
class Side:
    """One of the trainings and what was seen of it, step by step."""

    run: Run
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)

    def step(self, world: World, measured: bool) -> None:
        world.barrier()
        start = time.perf_counter()
        report = train_step(self.run)
        world.barrier()
        elapsed = time.perf_counter() - start
        tokens = self.run.config.train.batch * self.run.config.data.sequence_length
        self.losses.append(report.sums["loss"] / tokens)
        if measured:
            self.seconds.append(elapsed)
            self.reports.append(report)
        self.run.replan(report.loads, report.ranks, bool(report.sums["plan"]))
