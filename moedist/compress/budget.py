"""How many units every part of every expert keeps: one ranking of all units, and as long a prefix as the budget takes.

That one rule gives all modes, which differ in the ranking alone. It never exceeds a budget, and what it leaves out did
not fit; with one limit it falls short of it by less than the next unit and keeps no less of anything when it grows. Of
the numbers it is given it computes in one order everywhere, so it is the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Collection, Iterator, Mapping, Optional, Sequence

from moedist.compress.method import Curve, one_of
from moedist.errors import CompressError

MODES = ("global", "uniform", "frequency")
Key = Any  # of an expert, e.g. (layer, expert): hashable and sortable
Curves = Mapping[Key, Sequence[Curve]]
TOTAL = None  # the owner of all experts


@dataclass(frozen=True)
class Budget:
    """What all experts may take. `ratio` or `bytes`, or `owner_bytes`, or one of the former with it: then both hold.

    Attributes:
        ratio: share of the experts' bytes to remove, index vectors counted against it, at least 0 and below 1.
        bytes: that all experts may take, copies counted once.
        owner_bytes: that the experts on each owner may take, e.g. what a rank has memory for.
        owners: where every expert is, several for one with copies; needed with `owner_bytes`. An owner without an entry
            in `owner_bytes` has no limit of its own.
    """

    ratio: Optional[float] = None
    bytes: Optional[int] = None
    owner_bytes: Optional[Mapping[Any, int]] = None
    owners: Optional[Mapping[Key, Collection[Any]]] = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.bytes is not None:
            raise CompressError("can't provide both a ratio and bytes; choose one")
        if self.ratio is None and self.bytes is None and self.owner_bytes is None:
            raise CompressError("a budget needs a ratio, bytes, or bytes per owner")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise CompressError(f"ratio is {self.ratio:g}: the share to remove, at least 0 and below 1")
        if self.owner_bytes is not None and self.owners is None:
            raise CompressError("bytes per owner need to know the owners of every expert")

    def limited(self, key: Key) -> list[Any]:
        """The owners with a limit that an expert counts for."""
        total = [] if self.ratio is None and self.bytes is None else [TOTAL]
        return total + [owner for owner in (self.owners or {}).get(key, ()) if owner in (self.owner_bytes or {})]

    def limits(self, full: Mapping[Key, int], share: float = 1.0) -> dict[Any, int]:
        """Owner -> bytes, when only `share` of what is above the budget has to go; `full` are bytes uncompressed."""
        target: dict[Any, int] = dict(self.owner_bytes or {})
        if self.ratio is not None:
            target[TOTAL] = math.floor((1 - self.ratio) * sum(full.values()) + 1e-6)
        elif self.bytes is not None:
            target[TOTAL] = self.bytes
        above = {owner: -limit for owner, limit in target.items()}
        for key, size in full.items():
            for owner in self.limited(key):
                above[owner] += size
        return {owner: limit + math.floor((1 - share) * max(0, above[owner])) for owner, limit in target.items()}


def full_bytes(curves: Curves, itemsize: int = 4) -> dict[Key, int]:
    """Bytes of every expert with all units kept."""
    return {key: sum(curve.bytes(curve.units, itemsize) for curve in parts) for key, parts in curves.items()}


def allocate(curves: Curves, budget: Budget, mode: str = "global", floor: float = 0.02, *,
             frequency: Optional[Mapping[Key, float]] = None, itemsize: int = 4, share: float = 1.0,
             full: Optional[Mapping[Key, int]] = None) -> dict[Key, dict[str, int]]:
    """Units to keep of every part of every expert. Stage 2: the same on every rank, from the same curves.

    Args:
        curves: of all experts of all layers and ranks.
        mode: "global" ranks units by gain per number, over everything; where gains rise towards later, cheaper units,
            by their average up to there (the concave hull of gain over numbers). "uniform" keeps the same share of
            numbers everywhere. "frequency" keeps a share in proportion to `frequency`, or all.
        floor: share of the units of every part that is kept in any case, rounded up to its step; at least one step.
        frequency: tokens routed to every expert, for its mode.
        itemsize: bytes of a stored number.
        share, full: for methods of several rounds, see `Budget.limits`; `full` defaults to all units of `curves`.

    Ties fall to the part with the least share kept, then by key, then by part.

    Returns:
        key -> part -> units: a multiple of the curve's step, or all.

    Raises:
        CompressError: the floors alone exceed a budget; an unknown mode; no frequency given for an expert.
    """
    one_of("mode", mode, MODES)
    keys = sorted(curves)
    unknown = set(keys) - set(frequency or {})
    if mode == "frequency" and unknown:
        raise CompressError(f"mode frequency needs the routed tokens of all {len(keys)} experts; {len(unknown)} have "
                            f"none given")
    rooms = _Rooms(budget, budget.limits(full or full_bytes(curves, itemsize), share), curves, itemsize)
    parts = [(key, curve) for key in keys for curve in curves[key]]
    states, ranked = [], []
    for i, (key, curve) in enumerate(parts):
        all_fits = all(owner in rooms.ample for owner in budget.limited(key))
        start = curve.units if all_fits else _floor_units(curve, floor)
        states.append(start)
        rooms.add(key, curve.bytes(start, itemsize))
        weight = max(0.0, float(frequency[key])) if mode == "frequency" else 1.0
        for priority, fill, blocks in _ranking(curve, start, mode, weight):
            ranked.append((priority, fill, i, blocks))
    rooms.check_floors(floor)
    for _, _, i, blocks in sorted(ranked, key=lambda entry: entry[:3]):
        key, curve = parts[i]
        for kept in blocks:
            if not rooms.take(key, curve.bytes(kept, itemsize) - curve.bytes(states[i], itemsize)):
                break
            states[i] = kept
    keep: dict[Key, dict[str, int]] = {key: {} for key in keys}
    for (key, curve), kept in zip(parts, states):
        keep[key][curve.part] = kept
    return keep


class _Rooms:
    """Bytes taken and free at every owner; an owner whose next unit does not fit takes no more."""

    def __init__(self, budget: Budget, limits: dict[Any, int], curves: Curves, itemsize: int):
        self.budget, self.limits = budget, limits
        self.used = dict.fromkeys(limits, 0)
        self.closed: set[Any] = set()
        whole = dict.fromkeys(limits, 0)
        for key, size in full_bytes(curves, itemsize).items():
            for owner in budget.limited(key):
                whole[owner] += size
        # all but one neuron, with their names, can take more than all: what fits whole is never built up
        self.ample = {owner for owner, size in whole.items() if size <= limits[owner]}

    def add(self, key: Key, size: int) -> None:
        for owner in self.budget.limited(key):
            self.used[owner] += size

    def take(self, key: Key, size: int) -> bool:
        owners = self.budget.limited(key)
        if not self.closed.isdisjoint(owners):
            return False  # before the rest: units after one that was passed over must not close the other owners
        full = {owner for owner in owners if self.used[owner] + size > self.limits[owner]}
        self.closed |= full
        if full:
            return False
        self.add(key, size)
        return True

    def check_floors(self, floor: float) -> None:
        for owner, limit in self.limits.items():
            if self.used[owner] > limit:
                where = "all experts" if owner is TOTAL else f"the experts of owner {owner}"
                raise CompressError(f"{where} may take {limit} bytes, but the least that is kept of each (floor "
                                    f"{floor:g}, whole steps) takes {self.used[owner]}: remove less, or lower the "
                                    f"floor or the method's multiple")


def _floor_units(curve: Curve, floor: float) -> int:
    steps = max(1, math.ceil(floor * curve.units / curve.step - 1e-9))
    return min(curve.units, steps * curve.step)


def _ranking(curve: Curve, start: int, mode: str, weight: float) -> Iterator[tuple[float, float, list[int]]]:
    """(priority, share of numbers kept, states) of a curve above its floor, in order; least priority first."""
    states = [*range(start + curve.step, curve.units, curve.step), *([curve.units] if start < curve.units else [])]
    if mode != "global":
        for kept in states:
            fill = curve.numbers[kept] / max(1, curve.numbers[-1])
            yield (fill / weight if weight > 0 else math.inf), fill, [kept]
        return
    total = [0.0, *accumulate(curve.gain.tolist())]
    hull: list[tuple[float, int, list[int]]] = []  # gain, numbers, states: slopes fall
    previous = start
    for kept in states:
        gain, numbers, blocks = total[kept] - total[previous], curve.numbers[kept] - curve.numbers[previous], [kept]
        previous = kept
        while hull and _slope(gain, numbers) > _slope(*hull[-1][:2]):
            before = hull.pop()
            gain, numbers, blocks = before[0] + gain, before[1] + numbers, before[2] + blocks
        hull.append((gain, numbers, blocks))
    for gain, numbers, blocks in hull:
        yield -_slope(gain, numbers), curve.numbers[blocks[0]] / max(1, curve.numbers[-1]), blocks


def _slope(gain: float, numbers: int) -> float:
    return gain / numbers if numbers else math.inf
