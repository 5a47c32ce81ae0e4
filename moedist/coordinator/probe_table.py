"""What a probe found, for people: on screen, and as the kinds of a cluster file."""

from __future__ import annotations

from typing import Iterable, Sequence

from moedist.coordinator.cluster_file import alike
from moedist.coordinator.facts import RankFacts
from moedist.text_table import table

MOST_LINES = 32  # beyond, ranks are shown kind by kind


def describe(facts: Sequence[RankFacts]) -> str:
    """The speeds as a table: one line a rank, or one a kind of ranks where there are many."""
    fastest = max(f.expert_rows_per_s for f in facts)
    rows = [[ranks_text(ranks), _one(f.host for f in group), _one(f.device for f in group), group[0].device_name,
             _one(str(f.island) for f in group), number_range([f.expert_rows_per_s for f in group]),
             number_range([f.expert_rows_per_s / fastest for f in group], 3), _spread(group, "expert_spread"),
             number_range([f.dense_tokens_per_s for f in group]), _spread(group, "dense_spread"),
             number_range([f.free_bytes / 2**30 for f in group], 1)] for ranks, group in _lines(facts)]
    return table(["rank", "host", "device", "name", "island", "expert rows/s", "of fastest", "spread", "dense tokens/s",
                  "spread", "free GiB"], rows)


def describe_calls(facts: Sequence[RankFacts]) -> str:
    """What the speeds leave out, as a table: fixed times, links and memory."""
    rows = [[ranks_text(ranks), number_range([1e3 * f.expert_call_s for f in group], 3),
             number_range([1e3 * f.dense_call_s for f in group], 3),
             number_range([f.alltoall_bytes_per_s / 1e6 for f in group]),
             number_range([1e6 * f.alltoall_latency_s for f in group]),
             number_range([f.host_copy_bytes_per_s / 1e6 for f in group]),
             number_range([f.total_bytes / 2**30 for f in group], 1)] for ranks, group in _lines(facts)]
    return table(["rank", "expert call ms", "dense call ms", "all-to-all MB/s", "latency us", "host copy MB/s", "memory GiB"],
                 rows)


def _lines(facts: Sequence[RankFacts]) -> list[tuple[list[int], list[RankFacts]]]:
    groups = [[r] for r in range(len(facts))] if len(facts) <= MOST_LINES else alike(facts)
    return [([facts[i].rank for i in group], [facts[i] for i in group]) for group in groups]


def _spread(group: Sequence[RankFacts], name: str) -> str:
    return f"{number_range([100 * getattr(f, name) for f in group])} %" if group[0].measured else "given"


def _one(values: Iterable[str]) -> str:
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else f"{len(found)} of them"


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in few words.

    >>> ranks_text([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for r in ranks:
        if runs and r == runs[-1][-1] + 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def number_range(values: Iterable[float], digits: int = 0) -> str:
    """The value, or the least and the largest; 0 where there is none.

    >>> number_range([0.5, 2], 1), number_range([3, 3])
    ('0.5-2.0', '3')
    """
    values = list(values) or [0]
    low, high = (f"{v:,.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"
