"""`moedist probe`: measure the ranks of this machine, for people, for `moedist plan --cluster`, and as JSON."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Sequence

from moedist.config import check_config, load_config
from moedist.coordinator.cluster_file import cluster_yaml, kinds_of
from moedist.coordinator.facts import RankFacts, facts_to_json
from moedist.coordinator.probe import probe
from moedist.coordinator.probe_table import describe, describe_calls
from moedist.coordinator.sizes import likely_vocab
from moedist.dispatch import build_transport
from moedist.show_plan import refuse_missing_folder
from moedist.world import World


def show_probe(config_path: str, overrides: Sequence[str], yaml_path: str | None, json_path: str | None) -> list[RankFacts]:
    """Measure and print (rank 0), and write what was found.

    Args:
        yaml_path: where to write a cluster file for `moedist plan --cluster`.
        json_path: where to write a list of `RankFacts`, one object a rank.

    Returns:
        The facts of all ranks, on every rank.
    """
    refuse_missing_folder(yaml_path, json_path)
    config = load_config(config_path, overrides)
    with World.start(config.world) as world:
        check_config(config, world.size)
        say, start = world.say, time.perf_counter()
        facts = probe(world, config, likely_vocab(config), build_transport(world), say)
        if world.is_main:
            found = cluster_yaml(kinds_of(facts), f"measured by: moedist probe {' '.join([config_path, *overrides])}")
            say(f"{world.size} rank{'s' * (world.size > 1)} by {world.launcher}, measured in "
                f"{time.perf_counter() - start:.1f} s: the experts of a layer take call + rows / speed, all else call + "
                f"tokens / speed, forward and backward in {config.train.dtype}")
            say(f"\n{describe(facts)}\n\n{describe_calls(facts)}\n")
            say(f"for a cluster file (moedist plan {config_path} --cluster FILE):\n\n{found.rstrip()}")
            for path, text in ((yaml_path, found), (json_path, facts_to_json(facts))):
                if path:
                    Path(path).write_text(text, encoding="utf-8")
        return facts
