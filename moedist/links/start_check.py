"""The short test of links before a training: a broken link ends the run on every rank, a slow direction is told."""

from __future__ import annotations

import time
from typing import Callable, Optional

from moedist.dispatch import Transport
from moedist.errors import WorldError
from moedist.links.facts import LinkFacts, megabytes, uneven_links, wrong_text
from moedist.links.pairs import choose_pairs
from moedist.links.walk import PATIENCE_S, SMALL, Depth, measure_links
from moedist.liveness import Peer
from moedist.world import World

MOST_PAIRS = 4  # timed one after the other; rows between all ranks are checked besides
SHORT = Depth({SMALL: 0, 2**18: 1}, rounds=3)
AGAIN = Depth({2**20: 1}, rounds=5)  # links that seem slow one way


def link_test_wanted(world: World, setting: bool | str) -> bool:
    """Whether `world.link_test` asks for the test: auto does where there are several islands, or MPI carries rows."""
    if world.size == 1 or setting is False:
        return False
    return setting is True or len(set(world.islands)) > 1 or world.carrier == "mpi"


def check_links(world: World, transport: Transport, patience_s: float = PATIENCE_S,
                say: Optional[Callable[[str], None]] = None) -> list[LinkFacts]:
    """Test links between islands, or between all ranks where there is one island, and say what was seen. Collective.

    Args:
        say: is told, on every rank; None: `world.say`.

    Raises:
        WorldError: rows are changed on their way, or do not arrive; names links, and is the same on every rank.
    """
    say = say or world.say
    start, several = time.perf_counter(), len(set(world.islands)) > 1
    hosts = world.gather_objects(Peer.here().host)
    pairs = choose_pairs(world.islands, hosts, MOST_PAIRS, between=several)
    facts = measure_links(world, transport, pairs, SHORT, patience_s)
    if broken := [f for f in facts if f.wrong]:
        raise WorldError(wrong_text(broken))
    if uneven_links(facts):
        by_ranks = {(f.source, f.target): f for f in facts}
        suspects = [(a, b) for a, b in pairs if uneven_links([by_ranks[a, b], by_ranks[b, a]])]
        for line in uneven_links(measure_links(world, transport, suspects, AGAIN, patience_s)):
            say(f"warning: {line}")
    speeds = sorted(facts, key=lambda f: f.bytes_per_s)
    say(f"links {'between islands ' if several else ''}tested in {time.perf_counter() - start:.2f} s: all bytes arrive "
        f"as they were sent, {megabytes(speeds[0])} to {megabytes(speeds[-1])} MB/s one way on {len(pairs)} of them")
    return facts
