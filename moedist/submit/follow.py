"""Show what rank 0 of a job says, life after life, until the job has ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Callable

from moedist.errors import ConfigError
from moedist.submit.job_folder import JobFolder, Member
from moedist.submit.listing import ENDED, state_of
from moedist.submit.queue import queued

POLL_S = 0.5
ASK_S = 10.0  # between questions to Slurm
PATIENCE_S = 300.0  # Slurm itself holds back for two minutes what was requeued


class _Tail:
    """What is new in a file."""

    def __init__(self, path: Path):
        self.path, self._at = path, 0

    def show(self) -> None:
        if self.path.exists():
            with open(self.path, encoding="utf-8", errors="replace") as file:
                file.seek(self._at)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                self._at = file.tell()


def follow_file(path: Path, done: Callable[[], bool]) -> None:
    """A log, until `done`."""
    tail = _Tail(Path(path))
    while True:
        ended = done()
        tail.show()
        if ended:
            return
        time.sleep(POLL_S)


def follow(member: Member, fit: Callable[[JobFolder], object], patience_s: float = PATIENCE_S) -> None:
    """Rank 0's log of every life, and what Slurm says meanwhile, until the job has ended. Ctrl-C does not stop the job.

    Args:
        fit: submits a job anew on the nodes that are there; called where a heterogeneous job that ran before has waited for
            `patience_s`: Slurm gives it all its nodes or none.
    """
    tails: dict[str, _Tail] = {}
    folder, index = member.folder, 0 if member.path == member.folder.path else int(member.path.name)
    asked, state, since = -ASK_S, "", time.monotonic()
    try:
        while True:
            if time.monotonic() - asked > ASK_S:
                asked, last = time.monotonic(), state
                state = state_of(folder.read(), member, index, queued())
                if state != last:
                    since = time.monotonic()
                    print(f"-- {state.lower()} (job {folder.read().number(index)})", flush=True)
                if state == "PENDING" and time.monotonic() - since >= patience_s:
                    since = time.monotonic()
                    _fit(folder, member, fit)
            paths = [*folder.path.glob("slurm-*.log"), *member.logs.glob("*-0.log")]
            for path in sorted(paths, key=lambda p: p.stat().st_mtime):
                tails.setdefault(str(path), _Tail(path)).show()
            if state in ENDED:
                return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; moedist jobs {folder.path.name} --follow shows it again")


def _fit(folder: JobFolder, member: Member, fit: Callable[[JobFolder], object]) -> None:
    if folder.read().form != "hetjob" or not member.lives():
        return
    try:
        fit(folder)
    except ConfigError as error:
        print(f"-- waits on: {error}", flush=True)
    else:
        job = folder.read()
        print(f"-- not all nodes came back: submitted anew on {', '.join(job.kinds)} (job {job.number(0)})", flush=True)
