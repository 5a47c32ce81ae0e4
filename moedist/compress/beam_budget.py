"""Who gets how many bits, and how much rank: the decisions that all experts share, the same on every rank."""

from __future__ import annotations

from typing import Any, Mapping, Optional

from moedist.compress.beam import Beam, Lowered, Offer
from moedist.compress.choose import choose
from moedist.compress.compensate import compensator_bytes
from moedist.errors import CompressError

Key = Any  # of an expert


def decide_bits(offers: Mapping[Key, list[Offer]], beam: Beam, rows: Optional[Mapping[Key, float]] = None,
                weights: Optional[Mapping[Key, float]] = None) -> dict[Key, int]:
    """Bits of every expert, with all of them in no more bytes than at `beam.bits`. The same on every rank.

    Args:
        offers: of all experts, of the same widths in the same order.
        rows, weights: tokens routed to every expert and the sum of their router weights, for mix "importance".
    """
    if beam.mix == "uniform":
        return {key: beam.bits for key in offers}
    keys = sorted(offers)
    limit = sum(o.bytes for key in keys for o in offers[key] if o.bits == beam.bits)
    if beam.mix == "loss":
        costs = [[o.loss for o in offers[key]] for key in keys]
    else:
        total = sum(rows.values()) or 1.0
        trust = {key: rows[key] / total * (weights[key] / rows[key] if rows[key] else 0.0) for key in keys}
        costs = [[trust[key] * o.error for o in offers[key]] for key in keys]
    chosen = choose(costs, [[o.bytes for o in offers[key]] for key in keys], limit, "experts in low bits")
    return {key: offers[key][j].bits for key, j in zip(keys, chosen)}


def decide_ranks(lowered: Mapping[Key, Lowered], beam: Beam) -> dict[Key, dict[str, int]]:
    """The rank of every compensator, within the budget. The same on every rank.

    Raises:
        CompressError: the low-bit weights alone take more than the budget.
    """
    keys = sorted(lowered)
    base, weights = sum(lowered[key].bytes for key in keys), sum(lowered[key].weights for key in keys)
    if not beam.budget and not beam.bytes:
        return {key: dict.fromkeys(lowered[key].gains, 0) for key in keys}
    room = (beam.bytes or int(beam.budget * weights / 8)) - base
    if room < 0:
        raise CompressError(f"experts at {beam.bits} bits take {base} bytes with their scales, {8 * base / weights:.3f} bits "
                            f"a weight; the budget is {base + room}, {8 * (base + room) / weights:.3f}: raise it, or take "
                            "fewer bits or larger groups")
    ranks = {key: range(0, min(beam.most_rank, *lowered[key].shape) + 1, beam.rank_step) for key in keys}
    sizes = {key: [compensator_bytes(*lowered[key].shape, r, beam.factors) for r in ranks[key]] for key in keys}
    if beam.ranks == "loss":
        items = [(key, part) for key in keys for part in lowered[key].gains]
        costs = [[sum(lowered[key].gains[part][r:]) for r in ranks[key]] for key, part in items]
        found = choose(costs, [sizes[key] for key, _ in items], room, "compensators")
        chosen: dict[Key, dict[str, int]] = {key: {} for key in keys}
        for (key, part), j in zip(items, found):
            chosen[key][part] = ranks[key][j]
        return chosen
    parts = {key: len(lowered[key].gains) for key in keys}
    whole = [[parts[key] * size for size in sizes[key]] for key in keys]
    if beam.ranks == "kurtosis":
        found = choose([[-lowered[key].kurtosis * r for r in ranks[key]] for key in keys], whole, room, "compensators")
    else:
        most = max(len(of_expert) for of_expert in whole)
        fits = [j for j in range(most) if sum(of_expert[min(j, len(of_expert) - 1)] for of_expert in whole) <= room]
        found = [min(fits[-1], len(of_expert) - 1) for of_expert in whole]
    return {key: dict.fromkeys(lowered[key].gains, ranks[key][j]) for key, j in zip(keys, found)}
