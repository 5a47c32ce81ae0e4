"""Fewer neurons first, then low rank among those that stay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moedist.compress.calibration import Calibration
from moedist.compress.cur import DEFAULT_RIDGE, Cur
from moedist.compress.expert import Expert
from moedist.compress.low_rank import Interp
from moedist.compress.method import Compressed, Curve, Keep, Method
from moedist.errors import CompressError


@dataclass(frozen=True)
class CurHybrid(Method):
    """Joint CUR for part of what is to be removed, gauge-fixed weighted SVD of the remaining experts for the rest.

    Two rounds: the curves of the second are those of the experts that the first has narrowed, with the moments of their
    kept neurons. Cost: r (J + D - r) numbers and r indices a matrix, and J indices.

    Attributes:
        joint_share: of the bytes to remove, what joint CUR takes.
        multiple: of the widths J.
        ridge: of the least-squares down projection.
    """

    joint_share: float = 0.7
    multiple: int = 8
    ridge: float = DEFAULT_RIDGE

    def __post_init__(self) -> None:
        if not 0 < self.joint_share < 1:
            raise CompressError(f"joint_share is {self.joint_share:g}: between 0 and 1; for all or nothing use cur or "
                                f"interp")
        Cur(self.multiple, ridge=self.ridge)  # refuses what it cannot use

    @property
    def needs(self) -> frozenset[str]:
        return self._joint.needs | Interp().needs

    @property
    def shares(self) -> tuple[float, ...]:
        return (self.joint_share, 1.0)

    @property
    def _joint(self) -> Cur:
        return Cur(self.multiple, ridge=self.ridge)

    def gains(self, expert: Expert, calibration: Calibration, decided: Keep) -> list[Curve]:
        self.check(expert, calibration)
        if "neurons" not in decided:
            return self._joint.gains(expert, calibration, {})
        narrow = self._joint.compress(expert, calibration, decided)
        first, *others = Interp().gains(narrow.dense(), calibration.select(narrow.neurons), {})
        names = 0 if narrow.neurons is None else len(narrow.neurons)  # stored whatever the ranks
        return [replace(first, indices=tuple(names + n for n in first.indices)), *others]

    def compress(self, expert: Expert, calibration: Calibration, keep: Keep) -> Compressed:
        self.check(expert, calibration)
        narrow = self._joint.compress(expert, calibration, keep)
        low_rank = Interp().compress(narrow.dense(), calibration.select(narrow.neurons), keep)
        return Compressed(expert.hidden, narrow.neurons, low_rank.parts)
