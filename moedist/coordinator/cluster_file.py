"""A cluster that is not here, described in YAML: kinds of ranks, how many of each, and what one of them can do."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Sequence

from moedist.config import FileKind, key, load_dataclass
from moedist.coordinator.facts import RankFacts
from moedist.errors import ConfigError

CLUSTER = FileKind("a cluster file", "configs/clusters/mixed.yaml", "moedist plan --help")
NEEDED = ("ranks", "ranks_per_node", "expert_rows_per_s", "dense_tokens_per_s", "memory_gib")
ALIKE = 0.25  # ranks of one device whose speeds differ by less are of one kind


@dataclass(frozen=True)
class Kind:
    """Ranks that are alike. Speeds are those that `moedist probe` shows for the configuration that is planned for."""

    name: str = key("", "what to call these ranks, such as h100")
    ranks: int = key(1, "how many there are")
    ranks_per_node: int = key(1, "how many come and go together: one more node of this kind brings as many")
    vendor: str = key("", "nvidia, amd, intel, apple or cpu: ranks of one vendor are an island")
    expert_rows_per_s: float = key(0.0, "rows per second of one expert, forward and backward")
    expert_call_s: float = key(0.0, "seconds that a layer's experts take without any rows")
    dense_tokens_per_s: float = key(0.0, "tokens per second through everything but the experts, forward and backward")
    dense_call_s: float = key(0.0, "seconds that takes without any tokens")
    memory_gib: float = key(0.0, "free memory of a rank in GiB")
    link_gb_per_s: float = key(0.0, "all-to-all bandwidth of a rank in GB/s (0: links cost nothing)")
    link_latency_s: float = key(0.0, "seconds of an all-to-all of nothing")


@dataclass(frozen=True)
class ClusterFile:
    """The file as a whole."""

    kinds: list[Kind] = key(list, "the kinds of ranks")


def read_cluster(path: str | Path) -> list[Kind]:
    """The kinds of a cluster file.

    Raises:
        ConfigError: the file is missing or has an unknown key, a kind lacks its ranks, speeds or memory, or two kinds
            have one name.
    """
    kinds = load_dataclass(ClusterFile, path, kind=CLUSTER).kinds
    if not kinds:
        raise ConfigError(f"{path} describes no ranks; list them under kinds:, see configs/clusters/mixed.yaml")
    for i, kind in enumerate(kinds):
        needed = {name: getattr(kind, name) for name in NEEDED}
        if lacking := [f"{name}={value:g}" for name, value in needed.items() if not 0 < value < math.inf]:
            raise ConfigError(f"{path}: kinds[{i}] ({kind.name or 'no name'}) has {', '.join(lacking)}; each must be above 0 "
                              "(moedist probe measures speeds)")
        if negative := [f"{name}={value:g}" for name, value in vars(kind).items() if isinstance(value, float) and value < 0]:
            raise ConfigError(f"{path}: kinds[{i}] ({kind.name or 'no name'}) has {', '.join(negative)}; nothing can be below "
                              "0")
    names = Counter(kind.name for kind in kinds)
    if twice := [name or "no name" for name, n in names.items() if n > 1]:
        raise ConfigError(f"{path}: several kinds are called {', '.join(twice)}; give each a name of its own")
    return kinds


def facts_of(kinds: Sequence[Kind]) -> tuple[RankFacts, ...]:
    """One rank after the other, kind by kind."""
    vendors = list(dict.fromkeys(kind.vendor or kind.name for kind in kinds))
    return tuple(replace(_fact(kind, i, vendors.index(kind.vendor or kind.name)), rank=rank)
                 for rank, (kind, i) in enumerate((kind, i) for kind in kinds for i in range(kind.ranks)))


def _fact(kind: Kind, index: int, island: int) -> RankFacts:
    memory = int(kind.memory_gib * 2**30)
    return RankFacts(
        rank=index, host=f"{kind.name}-{index // kind.ranks_per_node}", device=kind.name, vendor=kind.vendor,
        device_name=kind.name, island=island, expert_call_s=kind.expert_call_s, expert_rows_per_s=kind.expert_rows_per_s,
        expert_spread=0.0, dense_call_s=kind.dense_call_s, dense_tokens_per_s=kind.dense_tokens_per_s, dense_spread=0.0,
        alltoall_bytes_per_s=1e9 * kind.link_gb_per_s, alltoall_latency_s=kind.link_latency_s, host_copy_bytes_per_s=0.0,
        free_bytes=memory, total_bytes=memory, measured=True)


def with_one_more_node(facts: Sequence[RankFacts], kind: Kind) -> tuple[RankFacts, ...]:
    """The ranks there are, and those of one more node of a kind."""
    known = {f.vendor or f.device_name: f.island for f in facts}
    island = known.get(kind.vendor or kind.name, 1 + max(f.island for f in facts))
    return (*facts, *(_fact(kind, len(facts) + i, island) for i in range(kind.ranks_per_node)))


def alike(facts: Sequence[RankFacts]) -> list[list[int]]:
    """Indices of ranks by kind: of one kind are ranks of the same device whose speeds differ by less than `ALIKE`."""
    groups: list[list[int]] = []
    for i in sorted(range(len(facts)), key=lambda i: (-facts[i].expert_rows_per_s, i)):
        for group in groups:
            if _alike(facts[group[0]], facts[i]):
                group.append(i)
                break
        else:
            groups.append([i])
    return [sorted(group) for group in sorted(groups, key=lambda group: min(group))]


def _alike(a: RankFacts, b: RankFacts) -> bool:
    return (a.vendor, a.device_name) == (b.vendor, b.device_name) and all(
        max(x, y) <= (1 + ALIKE) * min(x, y) for x, y in ((a.expert_rows_per_s, b.expert_rows_per_s),
                                                          (a.dense_tokens_per_s, b.dense_tokens_per_s)))


def kinds_of(facts: Sequence[RankFacts]) -> list[Kind]:
    """Measured ranks as kinds: medians of what was measured, and as many of them to a node as a host has at most."""
    groups = [[facts[i] for i in group] for group in alike(facts)]
    seen: Counter[str] = Counter()
    kinds = []
    for group in groups:
        name = group[0].device_name or group[0].device
        seen[name] += 1
        median = {attribute: statistics.median(getattr(f, attribute) for f in group) for attribute in (
            "expert_rows_per_s", "expert_call_s", "dense_tokens_per_s", "dense_call_s", "free_bytes",
            "alltoall_bytes_per_s", "alltoall_latency_s")}
        kinds.append(Kind(
            name=name if seen[name] == 1 else f"{name} ({seen[name]})", ranks=len(group),
            ranks_per_node=max(Counter(f.host for f in group).values()), vendor=group[0].vendor,
            expert_rows_per_s=median["expert_rows_per_s"], expert_call_s=median["expert_call_s"],
            dense_tokens_per_s=median["dense_tokens_per_s"], dense_call_s=median["dense_call_s"],
            memory_gib=median["free_bytes"] / 2**30, link_gb_per_s=median["alltoall_bytes_per_s"] / 1e9,
            link_latency_s=median["alltoall_latency_s"]))
    return kinds


def cluster_yaml(kinds: Sequence[Kind], comment: str) -> str:
    """A cluster file; `read_cluster` reads it back, numbers to four digits.

    Args:
        comment: its first line.
    """
    lines = [f"# {comment}", "kinds:"]
    for kind in kinds:
        for i, f in enumerate(fields(kind)):
            value = getattr(kind, f.name)
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else f"{value:.4g}" \
                if isinstance(value, float) else str(value)
            lines.append(f"  {'- ' if i == 0 else '  '}{f.name}: {text}")
    return "\n".join(lines) + "\n"
