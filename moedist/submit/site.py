"""What the site's Slurm has, and why a profile cannot run on it, before anything is submitted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Sequence

from moedist.errors import ConfigError
from moedist.submit.profile import NodeKind, Profile, seconds_of
from moedist.submit.queue import ask_slurm

DEAD = ("down", "fail", "unknown", "powering")  # states of nodes that nothing can be planned on; drained ones come back


@dataclass(frozen=True)
class Node:
    """A node of a partition as sinfo has it."""

    name: str
    partition: str
    features: frozenset[str]
    gres: str
    cpus: int
    memory_mib: int
    state: str
    time: str

    @property
    def default(self) -> bool:
        return self.partition.endswith("*")


def read_site() -> list[Node]:
    """All nodes of all partitions.

    Raises:
        ConfigError: there is no Slurm here.
    """
    nodes = []
    for line in ask_slurm("sinfo", "-h", "-N", "-o", "%N|%P|%f|%G|%c|%m|%T|%l"):
        name, partition, features, gres, cpus, memory, state, time = line.split("|")
        nodes.append(Node(name, partition, frozenset(features.split(",")), gres, int(cpus.rstrip("+")),
                          int(memory.rstrip("+")), state, time))
    return nodes


def refuse_impossible(profile: Profile, site: Sequence[Node]) -> None:
    """Raise `ConfigError` for the first kind that the site cannot give. What is not looked at here, Slurm refuses itself."""
    names = sorted({node.partition.rstrip("*") for node in site})
    wanted: Counter[str] = Counter()
    for kind in profile.kinds:
        here = [n for n in site if n.partition.rstrip("*") == kind.partition or (kind.partition is None and n.default)]
        where = f"kind {kind.name}"
        if not here:
            raise ConfigError(f"{where}: " + (f"there is no partition {kind.partition!r}" if kind.partition else
                                              "this Slurm has no default partition, so partition must be set")
                              + f"; there are {', '.join(names)}")
        partition = here[0].partition.rstrip("*")
        _refuse_time(kind.time or profile.time, here[0].time, f"{where}: partition {partition}")
        fitting = _fitting(kind, here, f"{where}: partition {partition}")
        wanted[partition] += kind.nodes
        if wanted[partition] > len(here):
            raise ConfigError(f"the kinds want {wanted[partition]} nodes of partition {partition}, which has {len(here)}; "
                              "set nodes lower")
        up = [n for n in fitting if not n.state.startswith(DEAD)]
        if len(up) < (kind.min_nodes or kind.nodes):
            print(f"warning: {where}: {len(fitting) - len(up)} of {len(fitting)} nodes are down now; the job waits until "
                  f"{kind.min_nodes or kind.nodes} are up")


def nodes_there(profile: Profile, site: Sequence[Node]) -> dict[str, int]:
    """How many nodes of each kind could start a job now, at most as many as the profile wants.

    Raises:
        ConfigError: fewer than a kind's min_nodes.
    """
    found: dict[str, int] = {}
    taken: set[str] = set()
    for kind in profile.kinds:
        here = [n for n in site if n.partition.rstrip("*") == kind.partition or (kind.partition is None and n.default)]
        free = [n.name for n in here if n.state == "idle" and n.name not in taken and _has_features(n, kind.constraint)
                and _has_gres(n, kind.gres)][:kind.nodes]
        taken |= set(free)
        found[kind.name] = len(free)
        least = kind.min_nodes or kind.nodes
        if len(free) < least:
            raise ConfigError(f"kind {kind.name}: {len(free)} nodes are idle now, and its min_nodes are {least}"
                              + ("" if kind.min_nodes else " (not set: all of them)") + "; wait, or give --nodes")
    return found


def _refuse_time(time: str, limit: str, where: str) -> None:
    if limit not in ("infinite", "UNLIMITED", "n/a") and seconds_of(time) > seconds_of(limit):
        raise ConfigError(f"{where} lets jobs run for {limit} at most, and the time limit is {time}; set time lower (a job "
                          "that reaches its limit saves, and comes back by itself)")


def _fitting(kind: NodeKind, here: Sequence[Node], where: str) -> list[Node]:
    """The nodes of a partition that have what a kind wants; refused, with what they lack first, where too few have it."""
    cores = kind.tasks_per_node * (kind.cpus_per_task or 1)
    steps = [("the feature " + str(kind.constraint), lambda n: _has_features(n, kind.constraint), "constraint",
              sorted(set().union(*(n.features for n in here)))),
             ("gres " + str(kind.gres), lambda n: _has_gres(n, kind.gres), "gres", sorted({n.gres for n in here})),
             (f"{cores} cores ({kind.tasks_per_node} ranks of {kind.cpus_per_task or 1})", lambda n: n.cpus >= cores,
              "tasks_per_node or cpus_per_task", sorted({str(n.cpus) for n in here}))]
    left, asked = list(here), f"{kind.nodes} node{'s' if kind.nodes > 1 else ''}"
    if len(left) < kind.nodes:
        raise ConfigError(f"{where} has {len(left)} nodes, and {kind.nodes} are asked for; set nodes: {len(left)} or less")
    for what, fits, name, there in steps:
        left = [node for node in left if fits(node)]
        if len(left) < kind.nodes:
            raise ConfigError(f"{where} has {len(left)} nodes with {what}, and {asked} {'are' if kind.nodes > 1 else 'is'} "
                              f"asked for; set nodes or {name} otherwise (its nodes have: {', '.join(there)})")
    return left


def _has_features(node: Node, constraint: str | None) -> bool:
    """Of constraints only names joined by & are understood; of others Slurm judges."""
    if constraint is None or not all(part.replace("_", "").replace("-", "").isalnum() for part in constraint.split("&")):
        return True
    return set(constraint.split("&")) <= node.features


def _has_gres(node: Node, gres: str | None) -> bool:
    """Whether a node has a gres such as gpu:2 or gpu:a100:2, as sinfo writes it: gpu:a100:4(S:0-1)."""
    for wanted in (gres or "").split(","):
        if not wanted:
            continue
        name, *rest = wanted.split(":")
        count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
        has = 0
        for entry in node.gres.split(","):
            parts = entry.split("(")[0].split(":")
            if parts[0] == name and (not rest or rest[0] in parts[1:-1]):
                has += int(parts[-1]) if parts[-1].isdigit() else 1
        if has < count:
            return False
    return True
