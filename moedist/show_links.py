"""`moedist probe --links`: every link between ranks, both ways, with known bytes; broken and uneven ones by name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Sequence

from moedist.config import check_config, load_config
from moedist.dispatch import build_transport
from moedist.errors import ConfigError, WorldError
from moedist.links import Depth, LinkFacts, choose_pairs, facts_to_json, measure_links
from moedist.links.facts import uneven_links, wrong_text
from moedist.links.pattern import DTYPES
from moedist.links.table import describe
from moedist.links.walk import SMALL
from moedist.liveness import Peer
from moedist.show_plan import refuse_missing_folder
from moedist.world import World

MOST_PAIRS = 28  # all of eight ranks
LONG = Depth({SMALL: 20, 2**16: 5, 2**22: 2}, rounds=5, dtypes=DTYPES, together=2**20)


def show_links(config_path: str, overrides: Sequence[str], json_path: str | None) -> list[LinkFacts]:
    """Measure and print (rank 0), and write what was found as JSON.

    Raises:
        ConfigError: there is one rank, or no folder for `json_path`.
        WorldError: a link is broken; after the table, where rows arrive at all.
    """
    refuse_missing_folder(json_path)
    config = load_config(config_path, overrides)
    with World.start(config.world) as world:
        check_config(config, world.size)
        if world.size == 1:
            raise ConfigError("one rank has no links; start several, such as torchrun --nproc-per-node 2 -m moedist probe "
                              f"{config_path} --links")
        start, hosts = time.perf_counter(), world.gather_objects(Peer.here().host)
        pairs = choose_pairs(world.islands, hosts, MOST_PAIRS)
        facts = measure_links(world, build_transport(world), pairs, LONG)
        islands = len(set(world.islands))
        world.say(f"{world.size} ranks by {world.launcher} in {islands} island{'s' * (islands > 1)}; rows by {world.transport}"
                  f"{f', between islands by {world.carrier}' if world.groups else ''}; {len(pairs)} of "
                  f"{world.size * (world.size - 1) // 2} links measured in {time.perf_counter() - start:.1f} s")
        world.say(f"one direction at a time, medians of {LONG.rounds} rounds, checked in "
                  f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}\n\n"
                  f"{describe(facts, world.island_names, hosts)}\n")
        if world.is_main and json_path:
            Path(json_path).write_text(facts_to_json(facts), encoding="utf-8")
        uneven, broken = uneven_links(facts), [f for f in facts if f.wrong]
        for line in uneven:
            world.say(f"warning: {line}")
        if broken:
            raise WorldError(wrong_text(broken))
        if not uneven:
            world.say("all bytes arrived as they were sent, and both directions are about as fast")
        return facts
