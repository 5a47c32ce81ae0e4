"""A cluster that is not here, described in YAML: kinds of ranks, how many of each, and what one of them can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moedist.config import key, load_dataclass
from moedist.coordinator.facts import RankFacts
from moedist.errors import ConfigError


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
        ConfigError: the file is missing or has an unknown key, or a kind lacks its ranks, speeds or memory.
    """
    kinds = load_dataclass(ClusterFile, path).kinds
    if not kinds:
        raise ConfigError(f"{path} describes no ranks; list them under kinds:, see configs/clusters/mixed.yaml")
    for i, kind in enumerate(kinds):
        lacking = [name for name in ("ranks", "ranks_per_node", "expert_rows_per_s", "dense_tokens_per_s", "memory_gib")
                   if getattr(kind, name) <= 0]
        if lacking:
            raise ConfigError(f"{path}: kinds[{i}] ({kind.name or 'no name'}) has {', '.join(f'{n}={getattr(kind, n):g}' for n in lacking)};"
                              " each must be above 0 (moedist probe measures speeds)")
    return kinds


def facts_of(kinds: list[Kind]) -> tuple[RankFacts, ...]:
    """One rank after the other, kind by kind."""
    vendors = list(dict.fromkeys(kind.vendor or kind.name for kind in kinds))
    facts: list[RankFacts] = []
    for kind in kinds:
        for i in range(kind.ranks):
            facts.append(RankFacts(
                rank=len(facts), host=f"{kind.name}-{i // kind.ranks_per_node}", device=kind.name, vendor=kind.vendor,
                device_name=kind.name, island=vendors.index(kind.vendor or kind.name),
                expert_call_s=kind.expert_call_s, expert_rows_per_s=kind.expert_rows_per_s, expert_spread=0.0,
                dense_call_s=kind.dense_call_s, dense_tokens_per_s=kind.dense_tokens_per_s, dense_spread=0.0,
                alltoall_bytes_per_s=1e9 * kind.link_gb_per_s, alltoall_latency_s=kind.link_latency_s,
                host_copy_bytes_per_s=0.0, free_bytes=int(kind.memory_gib * 2**30),
                total_bytes=int(kind.memory_gib * 2**30), measured=True))
    return tuple(facts)


def with_one_more_node(kinds: list[Kind], index: int) -> list[Kind]:
    """The cluster with one more node of a kind."""
    return [replace(kind, ranks=kind.ranks + kind.ranks_per_node) if i == index else kind for i, kind in enumerate(kinds)]


def kinds_of(facts: tuple[RankFacts, ...]) -> list[Kind]:
    """Measured ranks as a cluster of one kind a rank, so that a machine can be asked the same questions."""
    return [Kind(**_kind(fact)) for fact in facts]


def _kind(fact: RankFacts) -> dict[str, Any]:
    return {"name": f"{fact.device_name or fact.device} (rank {fact.rank})", "vendor": fact.vendor,
            "expert_rows_per_s": fact.expert_rows_per_s, "expert_call_s": fact.expert_call_s,
            "dense_tokens_per_s": fact.dense_tokens_per_s, "dense_call_s": fact.dense_call_s,
            "memory_gib": fact.free_bytes / 2**30, "link_gb_per_s": fact.alltoall_bytes_per_s / 1e9,
            "link_latency_s": fact.alltoall_latency_s}
