"""What Slurm says, asked by its own commands."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Sequence

from moedist.errors import ConfigError

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "SPECIAL_EXIT",
          "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")
QUEUE = ("squeue", "-t", "all", "--me", "-o", "%i|%T|%N|%r")  # sacct needs an accounting database, which not all sites have


def ask_slurm(*command: str) -> list[str]:
    """Lines of a Slurm command's answer.

    Raises:
        ConfigError: there is no Slurm here, or it refuses; its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {command[0]} here; log in to the cluster, or see slurm/devcluster for one on this "
                          "machine, or moedist submit --local for none") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} has not answered within 60 s; Slurm's controller seems to be down") from error
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {' '.join((done.stderr or done.stdout).split()) or 'refused'}")
    return done.stdout.splitlines()


@dataclass(frozen=True)
class Queued:
    """A job as Slurm has it."""

    state: str
    nodes: str
    reason: str

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def queued() -> dict[str, Queued]:
    """The user's jobs by number: those that wait or run, and those that ended some minutes ago.

    A heterogeneous job is listed under its first component's number, array elements as '12_3'.
    """
    return jobs_of(ask_slurm(*QUEUE)[1:])


def jobs_of(lines: Sequence[str]) -> dict[str, Queued]:
    """Jobs by number, of squeue's lines.

    A heterogeneous job is over when all its components are: the first of them may end while the batch script still runs.

    >>> jobs_of(["7+1|CANCELLED|a2|None", "7+0|COMPLETING|n1|None"])
    {'7': Queued(state='COMPLETING', nodes='a2,n1', reason='None')}
    """
    found: dict[str, Queued] = {}
    for line in lines:
        number, state, nodes, reason = (*line.split("|"), "", "")[:4]
        new = Queued(state, nodes, reason)
        for single in numbers_of(number):
            old = found.get(single, new)
            known = new if (new.active, number.endswith("+0")) > (old.active, False) else old
            both = nodes if old is new else ",".join(filter(None, [old.nodes, nodes]))
            found[single] = Queued(known.state, both, known.reason)
    return found


def numbers_of(text: str) -> list[str]:
    """'7+1' -> 7; '12_[0-2,4%3]' -> 12_0 12_1 12_2 12_4."""
    array = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", text)
    if not array:
        return [text.split("+")[0]]
    numbers: list[str] = []
    for part in array[2].split(","):
        first, _, last = part.partition("-")
        numbers += [f"{array[1]}_{n}" for n in range(int(first), int(last or first) + 1)]
    return numbers
