"""Experts made smaller: one method a file, one interface (`method`), found by name here.

Pure: tensors, numbers and dataclasses in and out. The stages are `calibrate` (sums over tokens), `Method.gains` (what
each unit is worth), `allocate` (one budget for all experts and layers), `Method.compress` (new weights).
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, TypeVar

from moedist.compress.beam import Beam
from moedist.compress.budget import MODES, Budget, allocate
from moedist.compress.calibration import ALL_NEEDS, Calibration, calibrate, calibration_bytes
from moedist.compress.cur import Cur, PruneMagnitude, PruneRandom
from moedist.compress.cur_matrix import CurMatrix
from moedist.compress.expert import Expert
from moedist.compress.hybrid import CurHybrid
from moedist.compress.low_rank import Interp, Svd, SvdFisher, SvdWhitened
from moedist.compress.lowbit import LowBit
from moedist.compress.matrices import ColumnsRows, Dense, Interpolated, Matrix, TwoFactors
from moedist.compress.method import Compressed, Curve, Method
from moedist.compress.pipeline import compress_experts, decide
from moedist.errors import CompressError

BEAM = "beam"  # low bits: no Method, since what it leaves is not trained
Built = TypeVar("Built")
METHODS: dict[str, type[Method]] = {
    "cur": Cur,
    "cur-hybrid": CurHybrid,
    "interp": Interp,
    "cur-matrix": CurMatrix,
    "svd": Svd,
    "svd-whitened": SvdWhitened,
    "svd-fisher": SvdFisher,
    "prune-random": PruneRandom,
    "prune-magnitude": PruneMagnitude,
}


def build_method(name: str, **options: Any) -> Method:
    """The method called `name`; options are the fields of its class.

    Raises:
        CompressError: an unknown name or option, with those there are; an impossible value.
    """
    if name == BEAM:
        raise CompressError("experts of method beam are not trained: it is no phase of a run; use moedist compress "
                            "RUN --method beam when the training is done")
    if name not in METHODS:
        near = difflib.get_close_matches(name, [*METHODS, BEAM], 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CompressError(f"no compression method {name!r}: {hint}there are {', '.join([*METHODS, BEAM])}")
    return _built(name, METHODS[name], options)


def build_beam(**options: Any) -> Beam:
    """Low bits with these options, the fields of `Beam`; raises as `build_method`."""
    return _built(BEAM, Beam, options)


def _built(name: str, cls: type[Built], options: dict[str, Any]) -> Built:
    known = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise CompressError(f"method {name} has no option {unknown[0]!r}; it has "
                            + ", ".join(f"{option} (default {default!r})" for option, default in known.items()))
    for option, value in options.items():
        kind = type(known[option])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise CompressError(f"{option} of method {name} is {value!r}: it must be of type {kind.__name__}, like the "
                                f"default {known[option]!r}")
    return cls(**options)


__all__ = ["ALL_NEEDS", "BEAM", "METHODS", "MODES", "Beam", "Budget", "Calibration", "ColumnsRows", "Compressed", "Cur",
           "CurHybrid", "CurMatrix", "Curve", "Dense", "Expert", "Interp", "Interpolated", "LowBit", "Matrix", "Method", "PruneMagnitude",
           "PruneRandom", "Svd", "SvdFisher", "SvdWhitened", "TwoFactors", "allocate", "build_beam", "build_method",
           "calibrate", "calibration_bytes", "compress_experts", "decide"]
