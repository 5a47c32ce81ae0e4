"""What a configuration says of every rank; a run may come back on another number of ranks, for which it means nothing."""

from __future__ import annotations

import dataclasses
from typing import Sequence

from moedist.config.schema import Config

PER_RANK = {"world": ("islands",), "placement": ("speeds", "dense_speeds", "max_experts", "max_batch")}


def for_ranks(config: Config, world_size: int) -> tuple[Config, list[str]]:
    """The configuration without lists that have an entry per rank of another world, and their names.

    `placement.owners`, `counts` and `batch_shares` are looked at where they become a plan.
    """
    dropped: dict[str, dict[str, object]] = {"world": {}, "placement": {}}
    for section, names in PER_RANK.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            if value is not None and len(value) != world_size:
                dropped[section][name] = None
    if any(len(factors) != world_size for factors in (config.world.slowdown or {}).values()):
        dropped["world"]["slowdown"] = None
    if config.world.device.count(",") and config.world.device.count(",") + 1 != world_size:
        dropped["world"]["device"] = "auto"
    fitted = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)
                                            for section, values in dropped.items()})
    return fitted, [f"{section}.{name}" for section, values in dropped.items() for name in values]


def number_islands(labels: Sequence[int | str]) -> tuple[int, ...]:
    """Island of every rank: numbers as they are, names numbered as they come.

    >>> number_islands(["nvidia", "amd", "nvidia"]), number_islands([1, 1, 0])
    ((0, 1, 0), (1, 1, 0))
    """
    if all(isinstance(label, int) for label in labels):
        return tuple(labels)
    known = list(dict.fromkeys(map(str, labels)))
    return tuple(known.index(str(label)) for label in labels)
