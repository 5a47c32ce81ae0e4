"""The low-bit form of a weight matrix [F, D], and the names that its tensors are stored by.

The groups of a scale run along the inputs: along D for gate and up, and along the neurons F for down, which is therefore
stored transposed. The names carry what shapes do not say: `q3g64` are codes of 3 bits in groups of 64, `left8g64` and
`right8g64` the factors of a compensator in 8 bits; beside them `scales`, `zeros`, `left_scales`, `right_scales`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterable, Mapping, Optional

import torch

from moedist.compress.compensate import Compensator, factor_scheme
from moedist.compress.matrices import Matrix
from moedist.compress.quantise import Quantised, Scheme
from moedist.errors import CompressError

CODES = re.compile(r"q(\d)g(\d+)")
FACTOR = re.compile(r"(left|right)(\d)g(\d+)")


@dataclass(frozen=True)
class LowBit(Matrix):
    """Few bits for all, and factors that restore some of what was lost.

    Attributes:
        weight: Q(W) [F, D], or its transpose [D, F].
        transposed: which.
        compensator: X Y [F, D]; None: there is none.
    """

    weight: Quantised
    transposed: bool
    compensator: Optional[Compensator] = None

    def tensors(self) -> dict[str, torch.Tensor]:
        scheme = self.weight.scheme
        found = {f"q{scheme.bits}g{scheme.group}": self.weight.codes, "scales": self.weight.scales}
        if self.weight.zeros is not None:
            found["zeros"] = self.weight.zeros
        if self.compensator is not None:
            for side in ("left", "right"):
                factor = getattr(self.compensator, side)
                found[f"{side}{factor.scheme.bits}g{factor.scheme.group}"] = factor.codes
                found[f"{side}_scales"] = factor.scales
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], hidden: int, width: int, transposed: bool) -> "LowBit":
        """The inverse of `tensors`, for a matrix [F, D]."""
        bits, group = _numbers(CODES, tensors)
        zeros = tensors.get("zeros")
        scheme = Scheme(bits, group, symmetric=zeros is None, ragged=True)
        weight = Quantised(tensors[f"q{bits}g{group}"], tensors["scales"], zeros, scheme, hidden if transposed else width)
        if "left_scales" not in tensors:
            return cls(weight, transposed)
        scheme = factor_scheme(*_numbers(FACTOR, tensors))
        sides = [Quantised(tensors[f"{side}{scheme.bits}g{scheme.group}"], tensors[f"{side}_scales"], None, scheme, columns)
                 for side, columns in (("left", hidden), ("right", width))]
        return cls(weight, transposed, Compensator(*sides))

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        weight = self.weight.dense(dtype)
        weight = weight.t() if self.transposed else weight
        return weight if self.compensator is None else weight + self.compensator.dense(dtype)

    def map_moments(self, moment: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        raise CompressError("low-bit experts are not trained: train the experts that they were made of")

    @property
    def numbers(self) -> int:
        rank = 0 if self.compensator is None else self.compensator.rank
        rows, columns = self.weight.shape
        return rows * columns + rank * (rows + columns)


def _numbers(pattern: re.Pattern, names: Iterable[str]) -> tuple[int, int]:
    """(bits, group) of the first name of this pattern."""
    match = next(match for name in names if (match := pattern.fullmatch(name)))
    return int(match[match.lastindex - 1]), int(match[match.lastindex])


def is_codes(name: str) -> bool:
    """Whether a name is that of a low-bit matrix's codes."""
    return CODES.fullmatch(name) is not None


def stored_dtype(name: str) -> torch.dtype:
    """Of a tensor of `LowBit`, by its name."""
    return torch.float16 if name.endswith("scales") else torch.uint8


def in_order(names: Iterable[str]) -> list[str]:
    """Names of the tensors of one matrix in the order of `LowBit.tensors`; those that are none of its tensors are left out."""
    kinds = (CODES, re.compile("scales"), re.compile("zeros"), re.compile(r"left\dg\d+"), re.compile("left_scales"),
             re.compile(r"right\dg\d+"), re.compile("right_scales"))
    names = list(names)
    return [name for kind in kinds for name in names if kind.fullmatch(name)]
