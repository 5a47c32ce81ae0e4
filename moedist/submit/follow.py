"""Show what rank 0 of a job says, life after life, until the job has ended; of a sweep, of all its trainings."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Callable, Mapping, Sequence

from moedist.errors import ConfigError
from moedist.submit.job_folder import Member
from moedist.submit.listing import ENDED, state_of
from moedist.submit.queue import Queued, queued

POLL_S = 0.5
ASK_S = 10.0  # between questions to Slurm
SOON_S = 1.0  # the same, after a life has ended
PATIENCE_S = 300.0  # Slurm itself holds back for two minutes what was requeued


class _Tail:
    """What is new in a file; with a mark before every line where it is one of several."""

    def __init__(self, path: Path, mark: str = ""):
        self.path, self.mark, self._at = path, mark, 0

    def show(self, last: bool = False) -> None:
        """Args: last: what has no end of line yet as well."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._at)
            new = file.read()
        if self.mark and not last:
            new = new[:new.rfind(b"\n") + 1]  # lines of several files do not run into one another
        self._at += len(new)
        text = new.decode("utf-8", errors="replace")
        sys.stdout.write("".join(self.mark + line for line in text.splitlines(keepends=True)) if self.mark else text)
        sys.stdout.flush()


def follow_file(path: Path, done: Callable[[], bool]) -> None:
    """A log, until `done`."""
    tail = _Tail(Path(path))
    while True:
        ended = done()
        tail.show()
        if ended:
            return
        time.sleep(POLL_S)


class _Followed:
    """One training: its logs, and its state as it was last seen."""

    def __init__(self, member: Member, mark: str):
        self.member, self.mark = member, mark
        self.state, self.since = "", time.monotonic()
        self._tails: dict[Path, _Tail] = {}

    def look(self, queue: Mapping[str, Queued]) -> None:
        last, self.state = self.state, state_of(self.member, queue)
        if self.state != last:
            self.since = time.monotonic()
            print(f"{self.mark}-- {self.state.lower()} (job {self.member.number})", flush=True)

    def show(self) -> None:
        paths = [*self.member.batch_logs(), *self.member.logs.glob("*-0.log")]
        for path in sorted(paths, key=lambda p: p.stat().st_mtime):
            self._tails.setdefault(path, _Tail(path, self.mark)).show(self.state in ENDED)

    def fit(self, fit: Callable[[Member], object]) -> None:
        """Submit it anew on the nodes that are there."""
        self.since = time.monotonic()
        if self.member.folder.read().form != "hetjob" or not self.member.lives():
            return
        try:
            fit(self.member)
        except ConfigError as error:
            print(f"{self.mark}-- waits on: {error}", flush=True)
        else:
            print(f"{self.mark}-- not all nodes came back: submitted anew on {', '.join(self.member.folder.read().kinds)} "
                  f"(job {self.member.number})", flush=True)


def follow(members: Sequence[Member], fit: Callable[[Member], object], patience_s: float = PATIENCE_S) -> bool:
    """Rank 0's log of every life, and what Slurm says meanwhile, until all have ended. Ctrl-C does not stop them.

    Args:
        members: trainings; the lines of several have their numbers before them.
        fit: submits one anew on the nodes that are there; called where a heterogeneous job that ran before has waited for
            `patience_s`: Slurm gives it all its nodes or none.

    Returns:
        Whether all that has ended was done: nothing failed, was given up or cancelled.
    """
    several = len(members) > 1
    followed = [_Followed(member, f"[{member.path.name}] " if several else "") for member in members]
    if several:
        print(f"-- {len(members)} trainings, each line with its number in front; one alone: moedist jobs {members[0].label} "
              "--follow", flush=True)
    asked, ended, lives = -ASK_S, -ASK_S, 0
    try:
        while True:
            if lives != (lives := sum(len(one.member.lives()) for one in followed)):
                ended = time.monotonic()  # a life has: see soon what becomes of the job
            if time.monotonic() - asked > (SOON_S if time.monotonic() - ended < ASK_S else ASK_S):
                asked, queue = time.monotonic(), queued()
                for one in followed:
                    one.look(queue)
                    if one.state == "PENDING" and time.monotonic() - one.since >= patience_s:
                        one.fit(fit)
            for one in followed:
                one.show()
            if all(one.state in ENDED for one in followed):
                return all(one.state == "DONE" for one in followed)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        first = members[0]
        print(f"\nthe job goes on; moedist jobs {first.path.parent.name if several else first.label} --follow shows it again")
        return True
