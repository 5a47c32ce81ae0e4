"""What every rank of a job does: train, or go on with the run of the life before."""

from __future__ import annotations

import atexit
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Optional

from moedist.submit.shape import SIGNAL


@dataclass
class Task:
    """A training; submitit pickles it, and calls it on every rank.

    Attributes:
        config: YAML file; overrides: dotted.
        submitted: seconds since 1970.
    """

    config: str
    overrides: list[str] = field(default_factory=list)
    submitted: float = 0.0

    def __call__(self) -> Optional[str]:
        began = time.time()
        hold_signals()
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as moedist.cli does, before torch is imported
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            _as_launched_here()
        from moedist.guard import guarded
        from moedist.milestones import pass_at
        for name, at in (("in the queue", os.environ.get("MOEDIST_STARTED")), ("until Python ran on the nodes", began)):
            pass_at(name, float(at) if at else began, since=self.submitted)
        return guarded(self._train)

    def _train(self) -> str:
        from moedist.trainer import train
        from moedist.world import find_launch, leave_process
        resume = os.environ.get("MOEDIST_RESUME") or None
        folder = train(self.config, self.overrides, resume)
        if find_launch().size > 1:
            atexit.register(leave_process)  # once submitit has written the result
        return str(folder)


def hold_signals() -> None:
    """Undo submitit's handlers, which would end rank 0 alone. The signal ahead of the time limit waits until training listens
    to it (`moedist.phases.run.Signals`); before, SIGTERM ends a rank: there is nothing to save."""
    number = getattr(signal, f"SIG{SIGNAL}")
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def _as_launched_here() -> None:
    """The variables that a launcher on one machine sets, from those of submitit's local executor."""
    from moedist.rendezvous.slurm import FIRST_PORT, PORTS
    env = os.environ
    env.update(RANK=env["SUBMITIT_LOCAL_GLOBALID"], LOCAL_RANK=env["SUBMITIT_LOCAL_LOCALID"],
               WORLD_SIZE=env["SUBMITIT_LOCAL_NTASKS"], MASTER_ADDR="127.0.0.1",
               MASTER_PORT=str(FIRST_PORT + int(env["SUBMITIT_LOCAL_JOB_ID"]) % PORTS))
    visible = env.pop("MOEDIST_VISIBLE_DEVICES", None)
    if visible is None:
        env.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides all that were not asked for
    else:
        env["CUDA_VISIBLE_DEVICES"] = visible
