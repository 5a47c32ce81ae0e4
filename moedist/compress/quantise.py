"""Low-bit matrices: what is stored, and the two ways to quantise that need no calibration.

A matrix W [R, C] has one row per output and one column per input. The C inputs are cut into groups; in each group of each
row w = scale (code - zero), codes 0 .. 2^bits - 1. A scale is float16. Symmetric: zero is the middle of the codes, a half
integer, and is not stored. Asymmetric: zero is real and stored in one byte. Everything is computed with the scale and zero
as they are stored, so that no rounding is left out of the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from moedist.compress.expert import require_finite
from moedist.compress.packing import check_bits, pack, packed_width, unpack
from moedist.errors import CompressError

SHRINK_POWER, SHRINK_START, SHRINK_GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20  # HQQ's defaults: p, beta, kappa, iterations
ZERO_STEPS = 255
LARGEST_SCALE = 65504.0  # float16


@dataclass(frozen=True)
class Scheme:
    """How numbers are stored.

    Attributes:
        bits: 2, 3, 4 or 8 a number.
        group: inputs that share a scale.
        symmetric: no zero point.
        ragged: the last group may be shorter; False: the group must divide the inputs.
    """

    bits: int = 4
    group: int = 64
    symmetric: bool = False
    ragged: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group < 1:
            raise CompressError(f"a group of {self.group} inputs: at least 1")

    @property
    def levels(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def groups(self, columns: int) -> int:
        """Groups of a row of so many inputs.

        Raises:
            CompressError: the group does not divide the inputs.
        """
        if columns % self.group and not self.ragged:
            raise CompressError(f"groups of {self.group} do not divide {columns} inputs: choose a divisor, such as "
                                f"{largest_divisor(columns, self.group)}")
        return -(-columns // self.group)

    def bytes(self, rows: int, columns: int) -> int:
        """That a matrix [rows, columns] takes, scales and zeros included."""
        return rows * (packed_width(columns, self.bits) + self.groups(columns) * (2 if self.symmetric else 3))


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)


@dataclass(frozen=True)
class Quantised:
    """A matrix [R, C] in few bits.

    Attributes:
        codes: uint8 [R, bytes], packed.
        scales: float16 [R, groups].
        zeros: uint8 [R, groups], in steps of levels / 255; None: symmetric.
        scheme, columns: how, and C.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: Optional[torch.Tensor]
    scheme: Scheme
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return len(self.codes), self.columns

    @property
    def bytes(self) -> int:
        """Bytes stored."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)

    def rows(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows as numbers, [.., C]: what a product unpacks at a time."""
        codes = unpack(self.codes[part], self.scheme.bits, self.columns).to(dtype)
        scales = self.scales[part].to(dtype)
        zeros = None if self.zeros is None else self.zeros[part].to(dtype)
        grid = Grid(scales, None if zeros is None else zeros * (self.scheme.levels / ZERO_STEPS), self.scheme)
        return grid.values(codes)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[R, C]."""
        return self.rows(slice(None), dtype)


@dataclass(frozen=True)
class Grid:
    """Scales and zeros [R, groups] as numbers, rounded to what is stored; zeros None: symmetric."""

    scales: torch.Tensor
    zeros: Optional[torch.Tensor]
    scheme: Scheme

    @classmethod
    def rounded(cls, scales: torch.Tensor, zeros: Optional[torch.Tensor], scheme: Scheme) -> "Grid":
        """Of any scales and zeros, what is stored.

        Raises:
            CompressError: a scale above float16.
        """
        if scales.numel() and float(scales.max()) > LARGEST_SCALE:
            raise CompressError(f"a scale of {float(scales.max()):g} is above the {LARGEST_SCALE:g} of float16: weights this "
                                "large cannot be stored in low bits")
        if zeros is not None:
            step = scheme.levels / ZERO_STEPS
            zeros = (zeros / step).round().clamp(0, ZERO_STEPS) * step
        return cls(scales.half().to(scales.dtype), zeros, scheme)

    def _spread(self, of_groups: torch.Tensor, columns: int) -> torch.Tensor:
        return of_groups.repeat_interleave(self.scheme.group, dim=1)[:, :columns]

    def _zeros(self, columns: int) -> torch.Tensor | float:
        return self.scheme.levels / 2 if self.zeros is None else self._spread(self.zeros, columns)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes of W [R, C], in its dtype."""
        columns = weight.shape[1]
        scales = self._spread(self.scales, columns)
        scaled = torch.where(scales > 0, weight / scales, 0.0)
        return (scaled + self._zeros(columns)).round().clamp(0, self.scheme.levels)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """scale (code - zero), [R, C]."""
        columns, group = codes.shape[1], self.scheme.group
        if columns % group:
            return (codes - self._zeros(columns)) * self._spread(self.scales, columns)
        grouped = codes.unflatten(1, (-1, group))  # broadcast: nothing is written out per column
        zeros = self.scheme.levels / 2 if self.zeros is None else self.zeros.unsqueeze(2)
        return (grouped - zeros).mul_(self.scales.unsqueeze(2)).flatten(1)

    def store(self, codes: torch.Tensor) -> Quantised:
        """With these codes, packed."""
        zeros = None
        if self.zeros is not None:
            zeros = (self.zeros * (ZERO_STEPS / self.scheme.levels)).round().to(torch.uint8)
        return Quantised(pack(codes, self.scheme.bits), self.scales.half(), zeros, self.scheme, codes.shape[1])


def range_grid(weight: torch.Tensor, scheme: Scheme, share: float = 1.0) -> Grid:
    """The grid that spans `share` of the range of every group, 0 included where it is asymmetric."""
    grouped = grouped_columns(weight, scheme)
    if scheme.symmetric:
        return Grid.rounded(2 * share * grouped.abs().amax(2) / scheme.levels, None, scheme)
    low, high = grouped.amin(2).clamp(max=0) * share, grouped.amax(2).clamp(min=0) * share
    scales = ((high - low) / scheme.levels).half().to(weight.dtype)
    return Grid.rounded(scales, torch.where(scales > 0, -low / scales, 0.0), scheme)


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> Quantised:
    """W [R, C] on the grid that spans each group's range.

    Raises:
        CompressError: a group that does not divide C; values that are not finite.
    """
    weight = checked(weight, scheme)
    grid = range_grid(weight, scheme)
    return grid.store(grid.codes(weight))


def half_quadratic(weight: torch.Tensor, scheme: Scheme) -> Quantised:
    """W with each group's zero (symmetric: scale) fitted for a sparse error: half-quadratic splitting of |W - What|_p^p.

    In turn: E = shrink_p(W - What, beta), the outliers that the grid need not reach, and the zero (scale) of least squares
    for W - E (HQQ: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", eqs. 4 to 8). A round
    that makes the error larger is the last, and is not kept.
    """
    weight = checked(weight, scheme)
    grid, beta = range_grid(weight, scheme), SHRINK_START
    codes = grid.codes(weight)
    best, least = (grid, codes), _power_error(weight, grid.values(codes))
    for _ in range(ROUNDS):
        residual = weight - grid.values(codes)
        size = residual.abs()
        outliers = residual.sign() * (size - size.clamp(min=1e-12).pow(SHRINK_POWER - 1) / beta).clamp(min=0)
        grid = _least_squares_grid(grid, codes, weight - outliers)
        codes, beta = grid.codes(weight), beta * SHRINK_GROWTH
        error = _power_error(weight, grid.values(codes))
        if error >= least:
            break
        best, least = (grid, codes), error
    return best[0].store(best[1])


def _least_squares_grid(grid: Grid, codes: torch.Tensor, target: torch.Tensor) -> Grid:
    """The grid with the zeros (symmetric: the scales) that bring these codes nearest to a target, group by group."""
    scheme = grid.scheme
    codes_G, target_G = grouped_columns(codes, scheme), grouped_columns(target, scheme)
    if grid.zeros is None:
        centred = codes_G - scheme.levels / 2
        return Grid.rounded(((centred * target_G).sum(2) / centred.square().sum(2)).clamp(min=0), None, scheme)
    scales = grid.scales.unsqueeze(2)
    return Grid.rounded(grid.scales, (codes_G - torch.where(scales > 0, target_G / scales, 0.0)).mean(2), scheme)


def _power_error(weight: torch.Tensor, values: torch.Tensor) -> float:
    return float((weight - values).abs().pow(SHRINK_POWER).sum())


def checked(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """W in float64, or CompressError where it cannot be quantised by this scheme."""
    scheme.groups(weight.shape[1])
    require_finite("a matrix to quantise", weight)
    return weight.detach().double()


def grouped_columns(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """[R, groups, group]; a shorter last group is filled up with its last column, which changes no range."""
    short = -weight.shape[1] % scheme.group
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], dim=1)
    return weight.unflatten(1, (-1, scheme.group))
