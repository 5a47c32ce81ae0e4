"""The plan: who owns which experts in every MoE layer, and who takes how much of the batch.

A plan is data. It is written as canonical JSON (sorted keys, no spaces, rounded floats), so that equal plans have equal
hashes on every rank, and it is saved in every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Sequence

from moedist.errors import PlacementError


@dataclass(frozen=True)
class LayerPlan:
    """Owners of the experts of one layer.

    Attributes:
        owners: for every expert, the ranks that hold it, ascending.
        shares: for every expert, the part of its rows that each of those ranks takes, summing to one.
        islands: island of every rank where each island has every expert and no row leaves its island; else empty. Of an
            island's rows, its owners then take parts as large as their shares are to each other.
        targets: for every expert, the part of the rows that its router is to aim at, above 0, summing to one (see
            `moedist.placement.targets`); empty: equal parts.
    """

    owners: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    islands: tuple[int, ...] = ()
    targets: tuple[float, ...] = ()

    @classmethod
    def single(cls, owner_of_expert: Sequence[int]) -> "LayerPlan":
        """A layer whose expert e lives on rank `owner_of_expert[e]` alone."""
        return cls(tuple((int(r),) for r in owner_of_expert), tuple((1.0,) for _ in owner_of_expert))

    @property
    def experts(self) -> int:
        return len(self.owners)

    @property
    def primaries(self) -> list[int]:
        """For every expert, the rank that keeps its optimizer state: its first owner, or, where every island has it, one
        owner after the other: the first would all be of one island."""
        if self.islands:
            return [ranks[e % len(ranks)] for e, ranks in enumerate(self.owners)]
        return [ranks[0] for ranks in self.owners]

    @property
    def copies(self) -> int:
        """Placements over one per expert."""
        return sum(len(ranks) - 1 for ranks in self.owners)

    def experts_of_rank(self, rank: int) -> list[int]:
        """Expert ids that a rank holds, ascending."""
        return [e for e, ranks in enumerate(self.owners) if rank in ranks]

    def of_ranks(self, members: Sequence[int]) -> "LayerPlan":
        """The layer as the ranks of one island see it, numbered from 0 in the order of `members` (ascending)."""
        owners, shares = [], []
        for ranks, parts in zip(self.owners, self.shares):
            mine = [(members.index(r), part) for r, part in zip(ranks, parts) if r in members]
            total = sum(part for _, part in mine)
            owners.append(tuple(r for r, _ in mine))
            shares.append(tuple(part / total if total else 1 / len(mine) for _, part in mine))
        return LayerPlan(tuple(owners), tuple(shares))


@dataclass(frozen=True)
class Plan:
    """Owners per MoE layer and batch shares per rank, for a world of `world_size` ranks.

    Attributes:
        layers: (index of the transformer block, its `LayerPlan`), ascending.
        batch_shares: relative part of the batch of every rank.
        speeds: measured expert rows per second of every rank; empty where nothing was measured.
        predicted_ms: predicted expert time of every rank in one step; empty where nothing was measured.
    """

    world_size: int
    layers: tuple[tuple[int, LayerPlan], ...]
    batch_shares: tuple[float, ...]
    speeds: tuple[float, ...] = ()
    predicted_ms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.batch_shares) != self.world_size:
            raise PlacementError(f"{len(self.batch_shares)} batch shares for {self.world_size} ranks; give one per rank")
        for index, layer in self.layers:
            if layer.islands and len(layer.islands) != self.world_size:
                raise PlacementError(f"layer {index}: {len(layer.islands)} islands for {self.world_size} ranks; give one per rank")
            if layer.targets and (len(layer.targets) != layer.experts or min(layer.targets) <= 0
                                  or abs(sum(layer.targets) - 1) > 1e-6):
                raise PlacementError(f"layer {index}: {len(layer.targets)} targets for {layer.experts} experts, "
                                     f"{list(layer.targets)}; give one per expert, above 0, summing to 1")
            for e, (ranks, shares) in enumerate(zip(layer.owners, layer.shares)):
                if not ranks:
                    raise PlacementError(f"layer {index}: expert {e} has no owner; every expert needs a rank")
                if len(ranks) != len(shares) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
                    raise PlacementError(f"layer {index}: expert {e} on ranks {list(ranks)} has shares {list(shares)}; "
                                         "they must be 0 or more and sum to 1")
                if min(ranks) < 0 or max(ranks) >= self.world_size or list(ranks) != sorted(set(ranks)):
                    raise PlacementError(f"layer {index}: expert {e} is placed on ranks {list(ranks)}, but the ranks are "
                                         f"0..{self.world_size - 1}, each at most once")
                missing = set(layer.islands) - {layer.islands[r] for r in ranks if layer.islands}
                if missing:
                    raise PlacementError(f"layer {index}: every island is to have all experts, but islands {sorted(missing)} do "
                                         f"not have expert {e}")

    def layer(self, index: int) -> LayerPlan:
        return dict(self.layers)[index]

    def to_json(self) -> str:
        """Canonical JSON; `from_json` reads it back equal up to rounding of floats to 9 digits."""
        tree = {
            "world_size": self.world_size,
            "layers": [[i, [list(o) for o in p.owners], [_rounded(s) for s in p.shares], *_more(p)] for i, p in self.layers],
            "batch_shares": _rounded(self.batch_shares),
            "speeds": _rounded(self.speeds),
            "predicted_ms": _rounded(self.predicted_ms),
        }
        return json.dumps(tree, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        tree = json.loads(text)
        layers = tuple((i, LayerPlan(tuple(map(tuple, owners)), tuple(map(tuple, shares)), *map(tuple, more)))
                       for i, owners, shares, *more in tree["layers"])
        return cls(tree["world_size"], layers, tuple(tree["batch_shares"]), tuple(tree["speeds"]),
                   tuple(tree["predicted_ms"]))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def moved(old: LayerPlan, new: LayerPlan) -> int:
    """Placements (expert, rank) of `new` that `old` has not."""
    return sum(len(set(ranks) - set(was)) for was, ranks in zip(old.owners, new.owners))


def moved_placements(old: Plan, new: Plan) -> int:
    """The same over all layers of a model."""
    return sum(moved(old.layer(i), layer) for i, layer in new.layers)


def _more(layer: LayerPlan) -> list[list[float]]:
    """What most layers have not: islands, then targets."""
    if layer.targets:
        return [list(layer.islands), _rounded(layer.targets)]
    return [list(layer.islands)] if layer.islands else []


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(v), 9) for v in values]
