"""How the ranks come to one plan: rank 0 solves, all get the same text, check it for themselves and vote.

Whatever fails, every rank learns of it and the old plan stays: nobody is left with another plan than the others.
"""

from __future__ import annotations

from typing import Callable

from moedist.errors import MoedistError
from moedist.placement import Plan
from moedist.world import World


def agree(world: World, solve: Callable[[], Plan], check: Callable[[Plan], str | None]) -> tuple[Plan | None, str]:
    """A plan that all ranks accept, or None and why there is none. Every rank must call it.

    Args:
        solve: called on rank 0 alone.
        check: called on every rank with the plan; an objection in words, or None.
    """
    message: dict[str, str] = {}
    if world.is_main:
        try:
            plan = solve()
            message = {"plan": plan.to_json(), "sha256": plan.sha256}
        except Exception as error:  # a planner that fails must not end a run that works
            message = {"failed": f"rank 0 could not plan: {_words(error)}"}
    message = world.broadcast_object(message)
    if "failed" in message:
        return None, message["failed"]
    proposal, objection = _read(message, world, check)
    votes = world.gather_objects(objection)
    against = [f"rank {rank}: {words}" for rank, words in enumerate(votes) if words]
    return (None, "; ".join(against)) if against else (proposal, "")


def _read(message: dict[str, str], world: World, check: Callable[[Plan], str | None]) -> tuple[Plan | None, str | None]:
    try:
        plan = Plan.from_json(message["plan"])
        if plan.sha256 != message["sha256"]:
            return None, (f"reads another plan ({plan.sha256[:12]}) than rank 0 wrote ({message['sha256'][:12]}); all ranks "
                          "must run the same moedist")
        if plan.world_size != world.size:
            return None, f"the plan is for {plan.world_size} ranks, the world has {world.size}"
        return plan, check(plan)
    except (MoedistError, ValueError, KeyError, TypeError) as error:
        return None, f"cannot read the plan: {_words(error)}"


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, MoedistError) else f"{type(error).__name__}: {text}"
