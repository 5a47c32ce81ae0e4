"""What Slurm's variables say of where rank 0 is, without asking Slurm: compute nodes may not be allowed to."""

from __future__ import annotations

import re
from typing import Mapping, Optional

from moedist.errors import WorldError

FIRST_PORT, PORTS = 12000, 16000  # below the ports that systems hand out themselves (32768 on Linux)
# the first that is set names rank 0's host first: in a heterogeneous job the other lists are the sorted union
NODE_LISTS = ("SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
ENTRY = rf"(?:[^,\[\]\s]|{RANGES})+"  # names with ranges of numbers in brackets
JOB_IDS = ("SLURM_HET_JOB_ID", "SLURM_JOB_ID", "SLURM_JOBID")  # a component of a heterogeneous job has an id of its own


def expand_nodes(text: str) -> list[str]:
    """Host names of a Slurm node list.

    >>> expand_nodes("amd[1-2,7],login,r[01-02]n[8-9]-ib")
    ['amd1', 'amd2', 'amd7', 'login', 'r01n8-ib', 'r01n9-ib', 'r02n8-ib', 'r02n9-ib']

    Raises:
        WorldError: it is not one.
    """
    hosts: list[str] = []
    if not re.fullmatch(rf"{ENTRY}(?:,{ENTRY})*", text.strip()):
        raise WorldError(f"Slurm's node list {text!r} cannot be read; set MASTER_ADDR to the host of rank 0", told_by="host")
    for entry in re.findall(ENTRY, text.strip()):
        names = [""]
        for brackets, plain in re.findall(r"\[([^\]]*)\]|([^\[]+)", entry):
            names = [name + piece for name in names for piece in ([plain] if plain else _ranges(brackets))]
        hosts += names
    return hosts


def _ranges(text: str) -> list[str]:
    """'1-3,07' -> 1 2 3 07; leading zeros keep their width."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def first_node(env: Mapping[str, str]) -> Optional[str]:
    """The host of rank 0, or None where no variable says it."""
    for name in NODE_LISTS:
        if env.get(name):
            return expand_nodes(env[name])[0]
    return None


def job_port(env: Mapping[str, str]) -> Optional[int]:
    """A port that the tasks of a step have in common and other jobs on the node most likely have not; None without Slurm.

    >>> job_port({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2"})
    16713
    """
    for name in JOB_IDS:
        if env.get(name, "").isdigit():
            # components of a heterogeneous job count their steps by themselves
            step = "" if name == "SLURM_HET_JOB_ID" else env.get("SLURM_STEP_ID", "")
            return FIRST_PORT + (int(env[name]) + (int(step) if step.isdigit() else 0)) % PORTS
    return None
