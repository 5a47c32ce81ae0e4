"""A plan that the user wrote down: owners or counts per rank; equal where nothing is said."""

from __future__ import annotations

from moedist.config import Config, number_islands
from moedist.errors import PlacementError
from moedist.placement.per_island import join_islands, members_of
from moedist.placement.plan import LayerPlan, Plan
from moedist.placement.shares import equal_counts, split_batch


def plan_from_config(config: Config, world_size: int) -> Plan:
    """The plan that `config.placement` describes for a world of this size.

    Raises:
        PlacementError: an expert without an owner or with two, a rank or expert that does not exist, counts that do not
            add up, or shares for another number of ranks.
    """
    p, experts = config.placement, config.model.experts
    if p.owners is not None and p.counts is not None:
        raise PlacementError("placement.owners and placement.counts are both set; choose one")
    apart = p.experts_in_every_island is True and world_size > 1
    layer = None if apart else _layer(p.owners, p.counts, experts, world_size)
    shares = p.batch_shares if p.batch_shares is not None else [1] * world_size
    if len(shares) != world_size:
        raise PlacementError(f"placement.batch_shares has {len(shares)} entries for {world_size} ranks; give one per rank")
    split_batch(config.train.batch, shares)  # refuses negative and all-zero shares
    layer = layer or _in_every_island(config, world_size, shares)
    return Plan(world_size, tuple((i, layer) for i in config.moe_layers()), tuple(float(s) for s in shares))


def _layer(owners: dict[int, list[int]] | None, counts: list[int] | None, experts: int, ranks: int) -> LayerPlan:
    if owners is not None:
        return LayerPlan.single(_from_owners(owners, experts, ranks))
    return LayerPlan.single(_from_counts(counts if counts is not None else equal_counts(experts, ranks), experts, ranks))


def _in_every_island(config: Config, world_size: int, shares: list[int]) -> LayerPlan:
    """What is written down for the ranks of each island."""
    p, labels = config.placement, config.world.islands
    if labels is None or len(labels) != world_size:
        raise PlacementError("placement.experts_in_every_island=true with a placement that is written down, or equal, needs to "
                             f"know the islands before the ranks meet; set world.islands to {world_size} names, one per rank")
    members = members_of(number_islands(labels))
    if len(members) == 1:
        return _layer(p.owners, p.counts, config.model.experts, world_size)
    if p.counts is not None and len(p.counts) != world_size:
        raise PlacementError(f"placement.counts {p.counts} names {len(p.counts)} ranks but the world has {world_size}")
    layers = {}
    for island, ranks in members.items():
        try:
            layers[island] = _layer(
                None if p.owners is None else {i: p.owners[r] for i, r in enumerate(ranks) if r in p.owners},
                None if p.counts is None else [p.counts[r] for r in ranks], config.model.experts, len(ranks))
        except PlacementError as error:
            raise PlacementError(f"island {labels[ranks[0]]!r} (ranks {ranks}, here counted from 0): {error}") from error
    rows = {island: sum(shares[r] for r in ranks) / sum(shares) for island, ranks in members.items()}
    return join_islands(number_islands(labels), layers, rows)


def _from_counts(counts: list[int], experts: int, world_size: int) -> list[int]:
    if len(counts) != world_size:
        raise PlacementError(f"placement.counts {counts} names {len(counts)} ranks but the world has {world_size}; "
                             f"give {world_size} counts that sum to {experts}, such as {equal_counts(experts, world_size)}")
    if min(counts) < 0 or sum(counts) != experts:
        raise PlacementError(f"placement.counts {counts} sums to {sum(counts)} but model.experts is {experts}; give "
                             f"counts of 0 or more that sum to {experts}")
    return [rank for rank, count in enumerate(counts) for _ in range(count)]


def _from_owners(owners: dict[int, list[int]], experts: int, world_size: int) -> list[int]:
    owner_of_expert: list[int | None] = [None] * experts
    for rank, ids in owners.items():
        if not 0 <= rank < world_size:
            raise PlacementError(f"placement.owners names rank {rank} but the ranks are 0..{world_size - 1}; "
                                 f"start {rank + 1} ranks or change the map")
        for e in ids:
            if not 0 <= e < experts:
                raise PlacementError(f"placement.owners gives rank {rank} expert {e} but the experts are "
                                     f"0..{experts - 1}; remove it or raise model.experts")
            if owner_of_expert[e] is not None:
                raise PlacementError(f"placement.owners gives expert {e} to ranks {owner_of_expert[e]} and {rank}; "
                                     "name one owner")
            owner_of_expert[e] = rank
    missing = [e for e, rank in enumerate(owner_of_expert) if rank is None]
    if missing:
        raise PlacementError(f"placement.owners leaves experts {missing} of 0..{experts - 1} without an owner; "
                             "add them to a rank's list")
    return owner_of_expert
