"""What compression must know of the tokens an expert has seen: sums, so that ranks, copies and batches add up."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Collection, Optional

import torch

from moedist.compress.expert import Expert, require_finite
from moedist.errors import CompressError

ALL_NEEDS = frozenset({"input_moment", "hidden_moment", "gate_grad_moment", "up_grad_moment", "output_grad_moment",
                       "fisher"})
aten = torch.ops.aten


@dataclass(frozen=True)
class Calibration:
    """Sums over the tokens routed to one expert; x is its input, h its hidden neurons, L the loss.

    Every field is additive: add calibrations of batches, ranks and copies (or all-reduce `tensors()`) for the whole.
    Fields that were not asked for are None.

    Attributes:
        rows: float64 [], number of tokens.
        weight: float64 [], sum of their router weights.
        input_moment: [D, D] sum of x x^T.
        hidden_moment: [F, F] sum of h h^T.
        gate_grad_moment, up_grad_moment: [F, F] sum of g g^T, g = dL/d(x gate^T) or dL/d(x up^T).
        output_grad_moment: [D, D] sum of g g^T, g = dL/dy.
        fisher: [F] sum of (h_j dL/dh_j)^2, the first-order change of the loss when neuron j is taken out, squared.
    """

    rows: torch.Tensor
    weight: torch.Tensor
    input_moment: Optional[torch.Tensor] = None
    hidden_moment: Optional[torch.Tensor] = None
    gate_grad_moment: Optional[torch.Tensor] = None
    up_grad_moment: Optional[torch.Tensor] = None
    output_grad_moment: Optional[torch.Tensor] = None
    fisher: Optional[torch.Tensor] = None

    @classmethod
    def zeros(cls, hidden: int, width: int, needs: Collection[str], gated: bool = True,
              dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "Calibration":
        """No tokens yet, for an expert of F = `hidden` neurons and D = `width`; collects `needs` alone."""
        sums = {name: torch.zeros(shape, dtype=dtype, device=device)
                for name, shape in _shapes(hidden, width, needs, gated).items()}
        none = torch.zeros((), dtype=torch.float64, device=device)
        return cls(rows=none, weight=none.clone(), **sums)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was collected, by name, in a fixed order: sum these over ranks and copies."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __add__(self, other: "Calibration") -> "Calibration":
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            raise ValueError(f"calibrations of different content: {sorted(mine)} and {sorted(theirs)}")
        return Calibration(**{name: tensor + theirs[name] for name, tensor in mine.items()})

    def select(self, kept: Optional[torch.Tensor]) -> "Calibration":
        """The calibration of the hidden neurons `kept` [J] alone (None: all), for a second step on a narrowed expert.

        Exact for inputs and kept neurons; the gradients are those of the expert before it was narrowed.
        """
        if kept is None:
            return self
        kept, sums = kept.long(), self.tensors()
        for name in ("hidden_moment", "gate_grad_moment", "up_grad_moment"):
            if name in sums:
                sums[name] = sums[name][kept][:, kept]
        if "fisher" in sums:
            sums["fisher"] = sums["fisher"][kept]
        return Calibration(**sums)

    def check(self, expert: Expert, needs: Collection[str]) -> None:
        """Raise CompressError where a field that a method needs is missing, of another expert, or not finite."""
        for name, shape in _shapes(expert.hidden, expert.width, needs, expert.gate is not None).items():
            tensor = getattr(self, name)
            if tensor is None:
                raise CompressError(f"the method needs {name}, calibrated were {sorted(self.tensors())}: collect "
                                    f"{sorted(needs)}")
            if tuple(tensor.shape) != shape:
                raise CompressError(f"{name} has shape {tuple(tensor.shape)} for an expert that needs {shape}: "
                                    f"calibrate the expert as it is now")
            require_finite(f"{name} of an expert with {self.rows:.0f} tokens", tensor)


def calibration_bytes(hidden: int, width: int, needs: Collection[str], gated: bool = True, itemsize: int = 4) -> int:
    """Bytes that the calibration of one expert takes: up to 3 F^2 + 2 D^2 + F numbers, and two of 8 bytes."""
    shapes = _shapes(hidden, width, needs, gated).values()
    return 16 + itemsize * sum(torch.Size(shape).numel() for shape in shapes)


@torch.no_grad()
def calibrate(expert: Expert, x_nD: torch.Tensor, grad_y_nD: torch.Tensor,
              router_weights_n: Optional[torch.Tensor] = None, needs: Collection[str] = ALL_NEEDS,
              dtype: torch.dtype = torch.float32) -> Calibration:
    """The calibration of a batch of tokens.

    Args:
        x_nD: inputs of the expert.
        grad_y_nD: gradient of the loss with respect to the expert's outputs, the router's weight included.
        router_weights_n: the router's weights of the tokens; None counts 1 each.
        needs: the fields to fill.
        dtype: of the sums and of the arithmetic.

    Costs a forward and half a backward pass of the expert, and n F^2 multiply-adds per hidden moment.
    """
    gated = expert.gate is not None
    wanted = _shapes(expert.hidden, expert.width, needs, gated)
    expert = Expert.of({part: matrix.to(dtype) for part, matrix in expert.parts.items()})
    x, grad_y = x_nD.to(dtype), grad_y_nD.to(dtype)
    grad_h, h, up = grad_y @ expert.down.t(), expert.neurons(x), x @ expert.up.t()
    sums = {"rows": torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)}
    weights = x.new_ones(len(x)) if router_weights_n is None else router_weights_n
    sums["weight"] = weights.sum(dtype=torch.float64)
    if "input_moment" in wanted:
        sums["input_moment"] = x.t() @ x
    if "hidden_moment" in wanted:
        sums["hidden_moment"] = h.t() @ h
    if "output_grad_moment" in wanted:
        sums["output_grad_moment"] = grad_y.t() @ grad_y
    if "fisher" in wanted:
        sums["fisher"] = (h * grad_h).square().sum(0)
    gate = x @ expert.gate.t() if gated else None
    if "gate_grad_moment" in wanted:
        grad_gate = aten.silu_backward(grad_h * up, gate)
        sums["gate_grad_moment"] = grad_gate.t() @ grad_gate
    if "up_grad_moment" in wanted:
        grad_up = grad_h * aten.silu(gate) if gated else aten.gelu_backward(grad_h, up, approximate="tanh")
        sums["up_grad_moment"] = grad_up.t() @ grad_up
    return Calibration(**sums)


def _shapes(hidden: int, width: int, needs: Collection[str], gated: bool) -> dict[str, tuple[int, ...]]:
    unknown = set(needs) - ALL_NEEDS
    if unknown:
        raise ValueError(f"calibration does not know {sorted(unknown)}; it has {sorted(ALL_NEEDS)}")
    shapes = {"input_moment": (width, width), "hidden_moment": (hidden, hidden), "gate_grad_moment": (hidden, hidden),
              "up_grad_moment": (hidden, hidden), "output_grad_moment": (width, width), "fisher": (hidden,)}
    if not gated:
        del shapes["gate_grad_moment"]
    return {name: shape for name, shape in shapes.items() if name in needs}
