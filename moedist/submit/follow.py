"""Show what rank 0 of a job says, life after life, until the job has ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Callable

from moedist.submit.job_folder import Member
from moedist.submit.listing import ENDED, state_of
from moedist.submit.queue import queued

POLL_S = 0.5
ASK_S = 10.0  # between questions to Slurm


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


def follow(member: Member) -> None:
    """Rank 0's log of every life, and what Slurm says meanwhile, until the job has ended. Ctrl-C does not stop the job."""
    tails: dict[str, _Tail] = {}
    number = member.folder.read().numbers
    index = 0 if member.path == member.folder.path else int(member.path.name)
    last, asked, state = "", 0.0, ""
    try:
        while True:
            if time.monotonic() - asked > ASK_S or not asked or state in ENDED:
                asked = time.monotonic()
                job = member.folder.read()
                state = state_of(job, member, index, queued())
                if state != last:
                    print(f"-- {state.lower()}" + (f" (job {', '.join(number)})" if not last else ""), flush=True)
                last = state
            paths = [*member.folder.path.glob("slurm-*.log"), *member.logs.glob("*-0.log")]
            for path in sorted(paths, key=lambda p: p.stat().st_mtime):
                tails.setdefault(str(path), _Tail(path)).show()
            if state in ENDED:
                return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; moedist jobs {member.folder.path.name} --follow shows it again")
