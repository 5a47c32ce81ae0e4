"""The three stages in a row, for one process or for many."""

from __future__ import annotations

from typing import Callable, Mapping, Optional

from moedist.compress.budget import Budget, Curves, Key, allocate, full_bytes
from moedist.compress.calibration import Calibration
from moedist.compress.expert import Expert
from moedist.compress.method import Compressed, Keep, Method


def decide(method: Method, gains: Callable[[Mapping[Key, Keep]], Curves], budget: Budget, mode: str = "global",
           floor: float = 0.02, frequency: Optional[Mapping[Key, float]] = None,
           itemsize: int = 4) -> dict[Key, dict[str, int]]:
    """Stages 1 and 2: what every part of every expert keeps.

    Args:
        gains: called once for each of the method's shares with what is decided so far (nothing for an expert that is
            not in the mapping); returns the next curves of ALL experts, on many ranks gathered, the same on each.
        mode, floor, frequency, itemsize: see `allocate`.

    Raises:
        CompressError: an impossible budget; weights or a calibration that the method cannot work with.
    """
    decided: dict[Key, dict[str, int]] = {}
    full: dict[Key, int] = {}
    for share in method.shares:
        curves = gains(decided)
        full = full or full_bytes(curves, itemsize)
        keep = allocate(curves, budget, mode, floor, frequency=frequency, itemsize=itemsize, share=share, full=full)
        decided = {key: {**decided.get(key, {}), **parts} for key, parts in keep.items()}
    return decided


def compress_experts(experts: Mapping[Key, Expert], calibrations: Mapping[Key, Calibration], method: Method,
                     budget: Budget, mode: str = "global", floor: float = 0.02,
                     frequency: Optional[Mapping[Key, float]] = None, itemsize: int = 4,
                     gather: Callable[[Curves], Curves] = dict) -> dict[Key, Compressed]:
    """Compress the experts of this process.

    Args:
        experts, calibrations: of the experts here, by key; calibrations summed over ranks and copies.
        gather: given the curves of the experts here, returns those of all processes; a process alone has them all.
        mode, floor, frequency, itemsize: see `allocate`; frequency for all experts of all processes.
    """

    def gains(decided: Mapping[Key, Keep]) -> Curves:
        return gather({key: method.gains(expert, calibrations[key], decided.get(key, {}))
                       for key, expert in experts.items()})

    keep = decide(method, gains, budget, mode, floor, frequency, itemsize)
    return {key: method.compress(expert, calibrations[key], keep[key]) for key, expert in experts.items()}
