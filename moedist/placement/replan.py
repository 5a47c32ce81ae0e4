"""From the plan in force to a better one: only as much is moved as pays back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from moedist.placement.cost import cost, makespan
from moedist.placement.fill import search
from moedist.placement.hot import covered, covers
from moedist.placement.per_island import join_islands
from moedist.placement.plan import LayerPlan, moved
from moedist.placement.problem import Problem
from moedist.placement.refine import owners_of, pieces_of, with_best_shares
from moedist.placement.solve import plan_layer


Kind = Literal["stay", "moves", "full"]


@dataclass(frozen=True)
class Replan:
    """What to do with a layer.

    Attributes:
        layer: from now on.
        kind: stay (shares may differ, which moves nothing), moves (a few of the old placements changed) or full.
        makespan_s, old_makespan_s: with the new and the old plan, at the present loads and speeds.
        moved: placements that were not there before.
        forced: the old plan breaks a limit: it cannot stay, whatever a change costs.
    """

    layer: LayerPlan
    kind: Kind
    makespan_s: float
    old_makespan_s: float
    moved: int
    forced: bool = False


def replan_layer(problem: Problem, old: LayerPlan, move_cost_s: float = 0.0, horizon_steps: int = 100, tolerance: float = 0.03,
                 max_moves: int = 4) -> Replan:
    """The best of: the old owners with new shares; at most `max_moves` moves; a new plan, matched to the old.

    Each is worth its makespan over the next `horizon_steps` steps, plus what its copies and its moves cost. The old owners
    stay where another is better by less than `tolerance`, unless they break a limit.

    Args:
        problem: the present loads and speeds.
        old: the plan in force, for the same experts and ranks.
        move_cost_s: seconds that moving one expert takes, once.
    """
    if problem.island_rows is not None:
        return _replan_islands(problem, old, move_cost_s, horizon_steps, tolerance, max_moves)
    before = makespan(old, problem)
    stay = with_best_shares(list(old.owners), problem, keep=True)
    candidates: list[tuple[str, LayerPlan]] = [("stay", stay)] if fits(stay, problem, tolerance) else []
    for start in [stay] if candidates else covered(stay, problem):
        candidates += [("moves", plan) for plan in (start, *_moves(problem, start, max_moves - moved(old, start)))
                       if plan.owners != old.owners and fits(plan, problem, tolerance)]
    candidates.append(("full", match_ranks(plan_layer(problem), old, problem)))

    def price(plan: LayerPlan) -> float:
        return horizon_steps * cost(plan, problem) + move_cost_s * moved(old, plan)

    kind, best = min(candidates, key=lambda c: price(c[1]))
    if candidates[0][0] == "stay" and price(best) > (1 - tolerance) * price(stay):
        kind, best = "stay", stay
    if kind == "stay" and makespan(best, problem) > (1 - tolerance) * before:
        best = old  # not even the shares are worth a new plan
    return Replan(best, kind, makespan(best, problem), before, moved(old, best), candidates[0][0] != "stay")


def _replan_islands(problem: Problem, old: LayerPlan, *how: Any) -> Replan:
    """Every island for itself; all anew where the old plan did not have all experts in each."""
    before = makespan(old, problem)
    if old.islands != problem.islands:
        new = plan_layer(problem)
        return Replan(new, "full", makespan(new, problem), before, moved(old, new), forced=True)
    replans = {island: replan_layer(of_island, old.of_ranks(problem.members[island]), *how)
               for island, of_island in problem.of_islands.items()}
    kinds: Sequence[Kind] = ("full", "moves", "stay")
    kind = min((replan.kind for replan in replans.values()), key=kinds.index)
    layer = join_islands(problem.islands, {island: replan.layer for island, replan in replans.items()}, problem.rows_of)
    if layer.owners == old.owners and makespan(layer, problem) > (1 - how[2]) * before:
        layer = old
    return Replan(layer, kind, makespan(layer, problem), before, moved(old, layer),
                  any(replan.forced for replan in replans.values()))


def fits(plan: LayerPlan, problem: Problem, tolerance: float) -> bool:
    """Whether a plan keeps the limits: places of every rank (none where there is no speed), copies, hot experts."""
    held = np.bincount([r for ranks in plan.owners for r in ranks], minlength=len(problem.speeds))
    return bool((held <= np.asarray(problem.capacity)).all()) and plan.copies <= problem.most_copies \
        and covers(plan, problem, tolerance)


def _moves(problem: Problem, plan: LayerPlan, max_moves: int) -> list[LayerPlan]:
    """The plan after 1, 2, .. moves and swaps by local search, `max_moves` pieces at most, each with exact shares."""
    found, pieces, changed = [], pieces_of(plan, problem), 0
    while changed < max_moves:
        step = search(pieces, problem, max_changes=max_moves - changed, max_rounds=1)
        if not step:
            break
        changed += step
        found.append(with_best_shares(owners_of(pieces, len(problem.loads)), problem))
    return found


def match_ranks(new: LayerPlan, old: LayerPlan, problem: Problem) -> LayerPlan:
    """`new` with ranks that are alike (speed, island) exchanged so that most experts stay where they are.

    An assignment problem (Kuhn 1955) within each class of alike ranks.
    """
    ranks = len(problem.speeds)
    classes: dict[tuple[float, int], list[int]] = {}
    for r in range(ranks):
        classes.setdefault((problem.speeds[r], problem.islands[r] if problem.islands is not None else 0), []).append(r)
    old_of, new_of = ([set(layer.experts_of_rank(r)) for r in range(ranks)] for layer in (old, new))
    renamed, no_room = list(range(ranks)), -ranks * len(problem.loads)
    for alike in classes.values():
        if len(alike) > 1:
            kept = np.array([[len(new_of[a] & old_of[b]) if len(new_of[a]) <= problem.capacity[b] else no_room for b in alike]
                             for a in alike])
            rows, columns = linear_sum_assignment(-kept)
            for a, b in zip(rows, columns):
                renamed[alike[a]] = alike[b]
    owners, shares = [], []
    for held, parts in zip(new.owners, new.shares):
        pairs = sorted((renamed[r], part) for r, part in zip(held, parts))
        owners.append(tuple(r for r, _ in pairs))
        shares.append(tuple(part for _, part in pairs))
    return LayerPlan(tuple(owners), tuple(shares))
