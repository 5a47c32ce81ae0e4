"""What a run's schedule is made of: one file a phase. A phase is a function of (run, its value in the schedule)."""

from moedist.phases.check import check_training
from moedist.phases.compress import check_methods, compress_phase
from moedist.phases.run import Run
from moedist.phases.train import train_phase

PHASES = {"train": train_phase, "compress": compress_phase}

__all__ = ["PHASES", "Run", "check_methods", "check_training", "compress_phase", "train_phase"]
