"""What a run's schedule is made of: one file a phase. A phase is a function of (run, its value in the schedule)."""

from moedist.phases.run import Run
from moedist.phases.train import train_phase

PHASES = {"train": train_phase}

__all__ = ["PHASES", "Run", "train_phase"]
