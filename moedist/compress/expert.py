"""One expert as compression sees it: three matrices with one row per hidden neuron.

Shapes used in this room: D model width, F hidden neurons of an expert, J kept neurons, r rank, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch.nn import functional

from moedist.errors import CompressError


@dataclass(frozen=True)
class Expert:
    """A feed-forward expert, y = (act(x gate^T) * (x up^T)) @ down, or gelu(x up^T) @ down without a gate.

    Attributes:
        gate: [F, D], w1 of a swiglu bank; None for gelu (tanh form).
        up: [F, D], w3 of a swiglu bank, w1 of a gelu bank.
        down: [F, D], w2: row j is what hidden neuron j writes (the down projection, transposed).
    """

    gate: Optional[torch.Tensor]
    up: torch.Tensor
    down: torch.Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(matrix.shape) for matrix in self.parts.values()}
        if len(shapes) != 1 or self.up.ndim != 2:
            raise ValueError(f"gate, up and down must share one shape [F, D], got {sorted(shapes)}")

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The matrices by name, in a fixed order, without an absent gate."""
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        return {part: matrix for part, matrix in named.items() if matrix is not None}

    @property
    def hidden(self) -> int:
        """F."""
        return self.up.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.up.shape[1]

    @property
    def numbers(self) -> int:
        """Parameters."""
        return len(self.parts) * self.up.numel()

    @classmethod
    def of(cls, parts: dict[str, torch.Tensor]) -> "Expert":
        """The inverse of `parts`."""
        return cls(parts.get("gate"), parts["up"], parts["down"])

    def neurons(self, x_nD: torch.Tensor) -> torch.Tensor:
        """[n, F] activations of the hidden neurons."""
        up = x_nD @ self.up.t()
        if self.gate is None:
            return functional.gelu(up, approximate="tanh")
        return functional.silu(x_nD @ self.gate.t()) * up

    def __call__(self, x_nD: torch.Tensor) -> torch.Tensor:
        """[n, D] outputs."""
        return self.neurons(x_nD) @ self.down

    def select(self, kept: torch.Tensor) -> "Expert":
        """The expert of the hidden neurons `kept` [J] alone."""
        kept = kept.long()
        return Expert.of({part: matrix[kept] for part, matrix in self.parts.items()})

    def check(self) -> None:
        """Raise CompressError where a weight is not finite."""
        for part, matrix in self.parts.items():
            require_finite(part, matrix)


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CompressError, with the count, where a tensor holds NaN or infinity."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise CompressError(f"{name} holds {bad} values of {tensor.numel()} that are not finite: compress from a "
                            f"checkpoint before the run diverged, or calibrate again with a lower learning rate")
