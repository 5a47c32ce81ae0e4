"""Which pairs of ranks stand for all links, where there are too many to try each."""

from __future__ import annotations

import itertools
from typing import Sequence

Pair = tuple[int, int]


def choose_pairs(islands: Sequence[int], hosts: Sequence[str], most: int, between: bool = False) -> list[Pair]:
    """Pairs of ranks, the lower first: all of them where they are at most `most`, those of different islands first.

    Otherwise one pair for every two hosts or islands and for every host by itself, each of other ranks where it can be;
    where these are too many as well, as many of them as are allowed, at even distances. `between`: of different islands only.

    >>> choose_pairs([0, 0, 1], ["a", "a", "b"], 10)
    [(0, 2), (1, 2), (0, 1)]
    >>> choose_pairs([0, 0, 1, 1], ["a", "a", "b", "b"], 3)
    [(0, 2), (0, 1), (2, 3)]
    """
    pairs = sorted(itertools.combinations(range(len(islands)), 2), key=lambda p: islands[p[0]] == islands[p[1]])
    if between:
        pairs = [(a, b) for a, b in pairs if islands[a] != islands[b]]
    if len(pairs) <= most:
        return pairs
    places = list(zip(islands, hosts))
    groups: dict[frozenset, list[Pair]] = {}
    for a, b in pairs:
        groups.setdefault(frozenset((places[a], places[b])), []).append((a, b))
    chosen = [group[i % len(group)] for i, group in enumerate(groups.values())]
    return [chosen[i * len(chosen) // most] for i in range(most)] if len(chosen) > most else chosen
