"""The interface of all methods, in three stages.

1. `gains` on the rank that owns an expert: what each unit (a neuron, a rank) is worth, and what it costs.
2. `moedist.compress.budget.allocate` on every rank alike, on the gathered curves: how many units each part keeps.
3. `compress` on the owner: the new weights.

A method with several `shares` (the hybrid) goes through 1 and 2 once for each, told what has been decided before.
`moedist.compress.pipeline` runs all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Mapping, Optional, Sequence

import torch

from moedist.compress.calibration import Calibration
from moedist.compress.expert import Expert
from moedist.compress.matrices import INDEX_BYTES, Matrix
from moedist.errors import CompressError

Keep = Mapping[str, int]  # part -> units kept


@dataclass(frozen=True)
class Curve:
    """What keeping more of one part of one expert is worth and costs. Small: gather it over ranks.

    Attributes:
        part: "neurons", or "gate", "up", "down".
        gain: float64 [U] on the CPU: the worth of unit u in the method's own order. The scale is the same
            for all experts and layers of one method.
        numbers: numbers stored with n units, for n = 0..U, never falling; the last is the part uncompressed.
        indices: entries of index vectors stored with n units, for n = 0..U.
        step: units are kept in multiples of it, or all.
    """

    part: str
    gain: torch.Tensor
    numbers: tuple[int, ...]
    indices: tuple[int, ...]
    step: int = 1

    @property
    def units(self) -> int:
        """U."""
        return len(self.gain)

    def bytes(self, kept: int, itemsize: int = 4) -> int:
        """Bytes stored with `kept` units of numbers of `itemsize` bytes."""
        return self.numbers[kept] * itemsize + self.indices[kept] * INDEX_BYTES


@dataclass(frozen=True)
class Compressed:
    """An expert after compression.

    Attributes:
        hidden: F before.
        neurons: int32 [J] hidden neurons kept, ascending; None: all.
        parts: "gate" (not for gelu), "up" and "down", each a stored matrix [J, D].
    """

    hidden: int
    neurons: Optional[torch.Tensor]
    parts: Mapping[str, Matrix]

    @property
    def numbers(self) -> int:
        """Numbers stored, without index vectors."""
        return sum(matrix.numbers for matrix in self.parts.values())

    @property
    def bytes(self) -> int:
        """Bytes stored, index vectors included."""
        own = 0 if self.neurons is None else self.neurons.nbytes
        return own + sum(matrix.bytes for matrix in self.parts.values())

    def dense(self) -> Expert:
        """The expert of J neurons, as dense matrices, that computes the same function."""
        return Expert.of({part: matrix.dense() for part, matrix in self.parts.items()})

    def padded(self) -> Expert:
        """The same function in the shape before compression: neurons that were dropped are rows of zeros."""
        small = self.dense()
        if self.neurons is None:
            return small
        parts = {}
        for part, matrix in small.parts.items():
            parts[part] = matrix.new_zeros(self.hidden, small.width)
            parts[part][self.neurons.long()] = matrix
        return Expert.of(parts)

    def map_moments(self, gate_m: Optional[torch.Tensor], up_m: torch.Tensor, down_m: torch.Tensor,
                    second: bool = False) -> dict[str, dict[str, torch.Tensor]]:
        """Adam's moments [F, D] of the expert before, for the tensors stored now: part -> name -> tensor.

        Moments of neurons are indexed: a kept neuron keeps its own. Moments of factors follow the chain rule; `second`
        ones are mapped through squared factors and stay nonnegative (see `moedist.compress.matrices`).
        """
        before = {"gate": gate_m, "up": up_m, "down": down_m}
        kept = slice(None) if self.neurons is None else self.neurons.long()
        return {part: matrix.map_moments(before[part][kept], second) for part, matrix in self.parts.items()}


class Method(ABC):
    """A way to compress experts; frozen, its options are its fields.

    Attributes:
        shares: of the bytes to remove, how much is gone after each round of `gains` and `allocate`; the last is 1.
    """

    shares: ClassVar[tuple[float, ...]] = (1.0,)

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The fields of `Calibration` it reads."""

    @abstractmethod
    def gains(self, expert: Expert, calibration: Calibration, decided: Keep) -> list[Curve]:
        """The curves of the next round. Stage 1.

        Args:
            decided: what earlier rounds kept; {} in the first.

        Raises:
            CompressError: weights or calibration not finite, or of another shape.
        """

    @abstractmethod
    def compress(self, expert: Expert, calibration: Calibration, keep: Keep) -> Compressed:
        """Keep so many units of each part, in the weights' dtype. Stage 3. Keeping all units changes nothing, bitwise.

        Raises:
            CompressError: as in `gains`, or `keep` is not within the curves.
        """

    def check(self, expert: Expert, calibration: Calibration) -> None:
        """Raise CompressError for weights or a calibration that this method cannot work with."""
        expert.check()
        calibration.check(expert, self.needs)


def kept_units(keep: Keep, part: str, units: int) -> int:
    """`keep[part]`, or CompressError where that is not between 1 and `units`."""
    kept = keep.get(part)
    if kept is None or not 1 <= kept <= units:
        raise CompressError(f"cannot keep {kept} units of {part}, which has {units}; decided were {dict(keep)}")
    return kept


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise CompressError where an option is not one of its choices."""
    if value not in choices:
        raise CompressError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
