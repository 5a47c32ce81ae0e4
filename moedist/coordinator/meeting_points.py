"""Where islands meet: in every layer, where tokens go to the experts that there are once, or once a step, where every island
has all experts and their gradients are summed."""

from __future__ import annotations

from typing import Sequence

from moedist.config import PlacementConfig
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.sizes import Sizes
from moedist.errors import PlacementError
from moedist.placement import split_batch

ROWS_OF_HIDDEN = 0.75  # rows that cross for an expert in a step, over its hidden width, from which a copy is less; measured


def experts_in_every_island(config: PlacementConfig, facts: Sequence[RankFacts], slots: Sequence[int], sizes: Sizes,
                            dedup: str) -> tuple[bool, str]:
    """Whether every island gets all experts, and why, in words; the words are empty where there is one island.

    Args:
        slots: experts of a layer that every rank can hold; one without expert speed gets none.
        dedup: how often a token's row crosses, as `dispatch.dedup`.

    Raises:
        PlacementError: it is asked for, and an island cannot hold all experts.
    """
    wanted, islands = config.experts_in_every_island, [f.island for f in facts]
    known = sorted(set(islands))
    if len(known) == 1:
        return False, ""
    room = {i: sum(min(n, sizes.experts) for n, f in zip(slots, facts) if f.island == i and f.expert_rows_per_s > 0)
            for i in known}
    least = min(known, key=lambda i: room[i])
    full = f"island {least} (ranks {[r for r, i in enumerate(islands) if i == least]}) can hold {room[least]} of the " \
           f"{sizes.experts} experts of a layer"
    if wanted is True and room[least] < sizes.experts:
        raise PlacementError(f"placement.experts_in_every_island=true, but {full}; free memory there, add ranks, make experts "
                             "smaller, or set it to false")
    if wanted != "auto":
        return wanted, f"placement.experts_in_every_island={str(wanted).lower()}"
    rows, enough = crossing_rows(facts, sizes, dedup), ROWS_OF_HIDDEN * sizes.hidden
    why = (f"{rows:,.0f} rows of an expert would cross between islands in a step; above {enough:,.0f}, {ROWS_OF_HIDDEN:g} of its "
           "hidden width, a copy in every island is less (placement.experts_in_every_island)")
    if rows > enough and room[least] < sizes.experts:
        return False, f"{why}, but {full}"
    return rows > enough, why


def meeting(apart: bool) -> str:
    """When islands meet, in words."""
    return "once a step, every one has all experts" if apart else "in every layer"


def crossing_rows(facts: Sequence[RankFacts], sizes: Sizes, dedup: str) -> float:
    """Rows that would cross between islands in a step, for every copy that is needed to keep them: of an expert, in each
    island but one. Tokens and experts are taken to be spread as the islands' speeds are, and all experts to be as hot."""
    known = sorted({f.island for f in facts})
    dense, expert = ([sum(getattr(f, name) for f in facts if f.island == i) for i in known]
                     for name in ("dense_tokens_per_s", "expert_rows_per_s"))
    tokens_I = split_batch(sizes.tokens, dense)
    part_I = [speed / sum(expert) for speed in expert]
    k = sizes.rows / sizes.tokens
    rows = 0.0
    for i, tokens in enumerate(tokens_I):
        away = [part for j, part in enumerate(part_I) if j != i]
        rows += tokens * sum(k * part if dedup in ("none", "rank") else 1 - (1 - part) ** k for part in away)
    return rows / sizes.experts / (len(known) - 1)
