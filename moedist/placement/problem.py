"""What the planner is asked: the rows of every expert of one layer, and what every rank can do and hold.

E experts, W ranks. All-to-all is a barrier in every layer, so layers are planned one by one: each is a problem of its own,
and what counts is the makespan, the largest load over speed of any rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moedist.errors import PlacementError
from moedist.placement.per_island import members_of


@dataclass(frozen=True)
class Problem:
    """One layer to place.

    Attributes:
        loads: rows of every expert in one step, [E], 0 or more. Experts that cost less per row (compressed ones) are
            given with fewer rows: what counts is the work.
        speeds: rows per second of every rank, [W]; a rank with 0 takes no experts.
        slots: most experts of this layer that each rank may hold, copies included, [W]; None: no limit.
        islands: the island of every rank, [W]; None: all are in one.
        max_copies: most placements over the E that every layer needs.
        copy_cost_s: seconds that one more copy adds to every step (its gradients and weights travel); a copy must save
            more makespan than that.
        hot_copies: the so many hottest experts have a copy in every island, whatever it costs.
        island_rows: None, or every island has all experts and keeps its rows: the part of the rows that comes from the
            ranks of each island, ascending, summing to one. `max_copies` are then copies in each island.
    """

    loads: tuple[float, ...]
    speeds: tuple[float, ...]
    slots: tuple[int, ...] | None = None
    islands: tuple[int, ...] | None = None
    max_copies: int = 0
    copy_cost_s: float = 0.0
    hot_copies: int = 0
    island_rows: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        experts, ranks = len(self.loads), len(self.speeds)
        if not experts or not ranks:
            raise PlacementError(f"{experts} experts cannot be placed on {ranks} ranks; there must be one of each")
        if min(self.loads) < 0 or min(self.speeds) < 0 or max(self.speeds) <= 0:
            raise PlacementError(f"loads (least {min(self.loads):g}) and speeds (least {min(self.speeds):g}, largest "
                                 f"{max(self.speeds):g}) must be 0 or more, and one speed above 0")
        for name in ("slots", "islands"):
            value = getattr(self, name)
            if value is not None and len(value) != ranks:
                raise PlacementError(f"{len(value)} {name} for {ranks} ranks; give one per rank")
        room = sum(self.capacity)
        if room < experts:
            raise PlacementError(f"{experts} experts a layer do not fit: the ranks can hold {list(self.capacity)}, {room} in "
                                 "all; add ranks, compress the experts, or raise placement.max_experts")
        if self.island_rows is not None:
            if len(self.island_rows) != len(self.members):
                raise PlacementError(f"{len(self.island_rows)} island_rows for {len(self.members)} islands; give one per island")
            for island, ranks in self.members.items():
                room = sum(self.capacity[r] for r in ranks)
                if room < experts:
                    raise PlacementError(f"island {island} (ranks {ranks}) can hold {room} of the {experts} experts of a layer, "
                                         "and every island is to have all; set placement.experts_in_every_island=false")

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """Ranks of every island, both ascending."""
        return members_of(self.islands if self.islands is not None else (0,) * len(self.speeds))

    @cached_property
    def rows_of(self) -> dict[int, float]:
        """`island_rows` by island."""
        return dict(zip(self.members, self.island_rows or ()))

    @cached_property
    def of_islands(self) -> dict[int, "Problem"]:
        """The problem of every island for itself, where each has all experts."""
        def of(values: tuple, ranks: list[int]) -> tuple:
            return tuple(values[r] for r in ranks)

        return {island: Problem(tuple(part * load for load in self.loads), of(self.speeds, ranks), of(self.capacity, ranks),
                                None, self.max_copies, self.copy_cost_s)
                for (island, ranks), part in zip(self.members.items(), self.rows_of.values())}

    @cached_property
    def hottest(self) -> tuple[int, ...]:
        """The experts that `hot_copies` means, the hottest first; none where there is one island."""
        if self.islands is None or len(set(self.islands)) == 1:
            return ()
        return tuple(sorted(range(len(self.loads)), key=lambda e: (-self.loads[e], e))[: self.hot_copies])

    @cached_property
    def free_copies(self) -> int:
        """Copies that `hot_copies` asks for, beyond `max_copies`."""
        islands = {i for i, room in zip(self.islands or (), self.capacity) if room > 0}
        return len(self.hottest) * (len(islands) - 1) if self.hottest else 0

    @cached_property
    def most_copies(self) -> int:
        """Copies that a plan may have, those of `hot_copies` included: as many as are allowed and there are places for."""
        if self.island_rows is not None:
            return sum(len(self.loads) + of_island.most_copies for of_island in self.of_islands.values()) - len(self.loads)
        return min(self.max_copies + self.free_copies, sum(self.capacity) - len(self.loads))

    @cached_property
    def capacity(self) -> tuple[int, ...]:
        """Most experts per rank: its slots, E at most, none where the speed is 0."""
        experts = len(self.loads)
        slots = self.slots if self.slots is not None else (experts,) * len(self.speeds)
        return tuple(min(experts, max(0, s)) if v > 0 else 0 for s, v in zip(slots, self.speeds))

    @cached_property
    def fluid_s(self) -> float:
        """Seconds if rows went wherever there is time: sum(f) / sum(s) over the ranks that may hold experts."""
        return sum(self.loads) / sum(s for s, room in zip(self.speeds, self.capacity) if room > 0)
