"""`moedist bench layer --compressed`: the expert bank after compression at 70 % against the same bank before it."""

from __future__ import annotations

import math
from typing import Callable

import torch

from moedist.bench.figures import write_figures
from moedist.bench.interleave import interleaved_medians
from moedist.bench.layer import SHAPES, Shape, bench_device, forward_backward
from moedist.model import Bank, ExpertForm, build_bank
from moedist.model.forms import MATRICES

REMOVED = 0.7
MULTIPLE = 8  # of hidden neurons, as the kernels like
WHOLE, JOINT = "uncompressed", "joint CUR"


def compressed_forms(shape: Shape) -> dict[str, list[ExpertForm]]:
    """Name -> the forms of all experts, each kind with 30 % of the numbers (index vectors not counted)."""
    d, f, e = shape.width, shape.hidden, shape.experts
    kept = (1 - REMOVED) * f * d  # numbers of a matrix
    joint = _multiple(kept / d)
    # some experts keep two and a half times what others do; each pair keeps what two equal ones do
    uneven = [joint + sign * _multiple(joint * 0.75 * (i + 1) / (e // 2)) for i in range(e // 2) for sign in (-1, 1)]
    half = _multiple((1 - REMOVED / 2) * f)
    return {
        WHOLE: e * [ExpertForm.dense(d, f, True)],
        JOINT: e * [ExpertForm.dense(d, joint, True)],
        f"{JOINT}, unequal widths": [ExpertForm.dense(d, width, True) for width in uneven],
        "interpolative": e * [_interpolated(f, d, kept)],
        "joint CUR and interpolative": e * [_interpolated(half, d, kept)],
        "two factors": e * [_form(left=(f, r := int(kept / (f + d))), right=(r, d))],
        "C U R of each matrix": e * [_form(columns=(f, r := int(_smaller_root(-1, f + d, kept))), core=(r, r), rows=(r, d),
                                           column_ids=(r,), row_ids=(r,))],
    }


def bench_compressed(rounds: int, json_path: str | None, shape_name: str = "coarse",
                     dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Measure forward and backward of the banks, print a table, write the figure; see DESIGN for its name."""
    shape, device = SHAPES[shape_name], bench_device()
    rows = shape.tokens * shape.top_k
    counts = [rows // shape.experts + (i < rows % shape.experts) for i in range(shape.experts)]
    forms = compressed_forms(shape)
    runs = {name: _run(of_experts, counts, shape, dtype, device) for name, of_experts in forms.items()}
    seconds = interleaved_medians(runs, rounds, device=device, slow_factor=math.inf)
    numbers = {name: sum(form.numbers for form in of_experts) for name, of_experts in forms.items()}
    print(f"\n{shape_name} {dtype}: {rows} rows through {shape.experts} experts, D {shape.width}, F {shape.hidden}, "
          f"{device}, {torch.get_num_threads()} threads, forward + backward of the expert bank, median of {rounds} "
          f"interleaved rounds")
    for name, value in seconds.items():
        print(f"  {name:<32}{1e3 * value:>10.2f} ms{value / seconds[WHOLE]:>8.2f}x the time"
              f"{numbers[name] / numbers[WHOLE]:>8.3f}x the numbers")
    figures = {"layer.compressed70.time_ratio": seconds[JOINT] / seconds[WHOLE]}
    print(f"  layer.compressed70.time_ratio {figures['layer.compressed70.time_ratio']:.3f}")
    write_figures(figures, json_path)
    return figures


def _run(forms: list[ExpertForm], counts: list[int], shape: Shape, dtype: torch.dtype,
         device: torch.device) -> Callable[[], torch.Tensor]:
    bank: Bank = build_bank(0, range(shape.experts), forms, shape.width, "swiglu", device, dtype)
    bank.initialise(0, 0.02, 0.02)
    x = torch.randn(sum(counts), shape.width, device=device).to(dtype).requires_grad_()
    return forward_backward(lambda rows: bank(rows, counts), list(bank.parameters()), x, torch.randn_like(x))


def _multiple(neurons: float) -> int:
    return MULTIPLE * round(neurons / MULTIPLE)


def _interpolated(hidden: int, width: int, numbers: float) -> ExpertForm:
    rank = int(_smaller_root(1, hidden + width, numbers))  # r (J + D - r) numbers
    return _form(rest=(hidden - rank, rank), basis=(rank, width), kept=(rank,))


def _form(**shapes: tuple[int, ...]) -> ExpertForm:
    """All three matrices alike."""
    return ExpertForm.from_shapes({f"{matrix}.{name}": shape for matrix in MATRICES for name, shape in shapes.items()})


def _smaller_root(a: float, b: float, c: float) -> float:
    """The r of r (b - a r) = c that is nearer to 0."""
    return (b - math.sqrt(b * b - 4 * a * c)) / (2 * a)
