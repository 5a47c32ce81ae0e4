"""Ranks of one machine as two islands."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from moedist.dispatch import Transport, build_transport
from moedist.islands import Islands
from moedist.world import World


def islands_of(ranks: int) -> tuple[int, ...]:
    """The first half, rounded up, and the others.

    >>> islands_of(3)
    (0, 0, 1)
    """
    return tuple(int(2 * r >= ranks + ranks % 2) for r in range(ranks))


def split_in_two(world: World) -> Transport:
    """A transport over `islands_of` the ranks, gloo inside them and what `world` carries rows by between. Collective."""
    islands = islands_of(world.size)
    groups = Islands.connect(islands, world.rank, [None] * world.size, timedelta(seconds=world.timeout_s))
    return build_transport(replace(world, islands=islands, groups=groups))
