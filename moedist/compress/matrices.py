"""The forms a weight matrix W [F, D] may be stored in, each with its count of numbers and its way for Adam moments.

Moments of factors: with What = L R, the chain rule gives dL = dW R^T and dR = L^T dW, so a first moment maps in the
same way, m_L = m_W R^T and m_R = L^T m_W. A second moment is a mean of squares: v_L = v_W (R*R)^T is what squares map
to when the entries of a gradient are uncorrelated, and it cannot become negative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

INDEX_BYTES = 4  # int32


class Matrix(ABC):
    """A stored matrix. `tensors()` are trained, `indices()` are int32 names of real rows or columns."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The numbers stored, by name."""

    def indices(self) -> dict[str, torch.Tensor]:
        """The index vectors stored, by name."""
        return {}

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """[F, D]."""

    @abstractmethod
    def map_moments(self, moment: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        """Adam's first (or second) moment [F, D] of W as moments of `tensors()`, under the same names."""

    @property
    def numbers(self) -> int:
        """Numbers stored, without index vectors."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def bytes(self) -> int:
        """Bytes stored, index vectors included."""
        return sum(tensor.nbytes for tensor in (*self.tensors().values(), *self.indices().values()))


@dataclass(frozen=True)
class Dense(Matrix):
    """W itself: F D numbers."""

    weight: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def dense(self) -> torch.Tensor:
        return self.weight

    def map_moments(self, moment: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        return {"weight": moment}


@dataclass(frozen=True)
class TwoFactors(Matrix):
    """left [F, r] @ right [r, D]: r (F + D) numbers."""

    left: torch.Tensor
    right: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"left": self.left, "right": self.right}

    def dense(self) -> torch.Tensor:
        return self.left @ self.right

    def map_moments(self, moment: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        left, right = (_square_if(second, factor).to(moment.dtype) for factor in (self.left, self.right))
        return {"left": moment @ right.t(), "right": left.t() @ moment}


@dataclass(frozen=True)
class Interpolated(Matrix):
    """Rows `kept` [r] of What are `basis` [r, D], all others `rest` [F-r, r] @ basis: r (F + D - r) numbers, r indices.

    With the kept rows permuted first, What = [I; rest] @ basis, so x What^T is two thin GEMMs, z = x basis^T and
    [z, z rest^T], and h @ What is (h[kept] + h[others] rest) @ basis: r (F + D - r) multiply-adds per token either way.
    """

    kept: torch.Tensor
    rest: torch.Tensor
    basis: torch.Tensor

    @property
    def others(self) -> torch.Tensor:
        """int64 [F-r] rows that are not kept, ascending: the rows of `rest`."""
        rows = torch.ones(len(self.rest) + len(self.kept), dtype=torch.bool, device=self.kept.device)
        rows[self.kept.long()] = False
        return rows.nonzero().squeeze(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"rest": self.rest, "basis": self.basis}

    def indices(self) -> dict[str, torch.Tensor]:
        return {"kept": self.kept}

    def dense(self) -> torch.Tensor:
        weight = self.basis.new_empty(len(self.rest) + len(self.kept), self.basis.shape[1])
        weight[self.kept.long()] = self.basis
        weight[self.others] = self.rest @ self.basis
        return weight

    def map_moments(self, moment: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        rest, basis = (_square_if(second, factor).to(moment.dtype) for factor in (self.rest, self.basis))
        kept, others = moment[self.kept.long()], moment[self.others]
        return {"rest": others @ basis.t(), "basis": kept + rest.t() @ others}


@dataclass(frozen=True)
class ColumnsRows(Matrix):
    """columns C [F, r] @ core U [r, r] @ rows R [r, D], C and R real ones of W: r (F + D + r) numbers, 2 r indices."""

    column_ids: torch.Tensor
    row_ids: torch.Tensor
    columns: torch.Tensor
    core: torch.Tensor
    rows: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"columns": self.columns, "core": self.core, "rows": self.rows}

    def indices(self) -> dict[str, torch.Tensor]:
        return {"column_ids": self.column_ids, "row_ids": self.row_ids}

    def dense(self) -> torch.Tensor:
        return self.columns @ (self.core @ self.rows)

    def map_moments(self, moment: torch.Tensor, second: bool) -> dict[str, torch.Tensor]:
        core_rows = _square_if(second, self.core @ self.rows).to(moment.dtype)
        columns_core = _square_if(second, self.columns @ self.core).to(moment.dtype)
        columns, rows = (_square_if(second, factor).to(moment.dtype) for factor in (self.columns, self.rows))
        return {"columns": moment @ core_rows.t(), "core": columns.t() @ moment @ rows.t(),
                "rows": columns_core.t() @ moment}


def _square_if(second: bool, factor: torch.Tensor) -> torch.Tensor:
    return factor.square() if second else factor
