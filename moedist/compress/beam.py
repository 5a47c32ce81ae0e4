"""Low-bit experts with compensators: what every expert may take, and what it becomes.

After BEAM-LRC (Liu et al. 2025, arXiv 2512.17073): experts in few bits, and low-rank factors of what that has lost, which a
token uses only at the experts that its router trusts most. Stages, the first and third on the rank that owns an expert:

1. `offers`: what each width of bits would take and lose
2. `decide_bits`: one width for every expert, within the bytes that all experts at `bits` take
3. `lower`: the experts in those bits, and how much each rank of a compensator would give back
4. `decide_ranks`: ranks within what is left of the budget; then `restore` adds the compensators
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Mapping

import torch

from moedist.compress.calibration import Calibration
from moedist.compress.compensate import compensate, factor_scheme
from moedist.compress.expert import Expert
from moedist.compress.gptq import gptq
from moedist.compress.lowbit import LowBit
from moedist.compress.method import Compressed, one_of
from moedist.compress.packing import PLANES
from moedist.compress.quantise import Scheme, half_quadratic, round_to_nearest
from moedist.compress.weighting import norm_needs, spectrum, weighting
from moedist.errors import CompressError

QUANTISERS = ("gptq", "hqq", "rtn")
MIXES = ("uniform", "importance", "loss")
RANKS = ("loss", "kurtosis", "equal")
INPUTS = {"gate": "input_moment", "up": "input_moment", "down": "hidden_moment"}


@dataclass(frozen=True)
class Beam:
    """How experts are stored in few bits.

    Attributes:
        bits: 2, 3, 4 or 8 a weight; with `mix`, what all experts take together.
        group: inputs that share a scale (float16; a byte more where not `symmetric`). It must divide the model width; of
            hidden neurons, which compression may have made any number of, the last group may be shorter.
        quantiser: gptq (sees the inputs), hqq or rtn.
        mix: bits per expert: uniform, or by a linear program under the same bytes: importance (routed share times mean router
            weight times relative error; MC-MoE: Huang et al. 2024, arXiv 2410.06270, eq. 4) or loss (measured, in the norm of
            the loss's gradients).
        budget: bits a weight for all, compensators included; 0: without compensators.
        bytes: the same as bytes of all experts together; 0: `budget` says it.
        ranks: of compensators: loss (what each rank gives back, measured; per matrix), kurtosis (large ranks to the experts
            of largest kurtosis) or equal.
        factor_bits: 8 or 4, of compensators.
        rank_step, most_rank: ranks are multiples of the one up to the other.
        norm: plain, inputs or both: what a compensator is best in.
        ridge: relative, of the weights of that norm.
    """

    bits: int = 3
    group: int = 64
    symmetric: bool = False
    quantiser: str = "gptq"
    mix: str = "uniform"
    budget: float = 0.0
    bytes: int = 0
    ranks: str = "loss"
    factor_bits: int = 8
    rank_step: int = 1
    most_rank: int = 32
    norm: str = "both"
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        self.scheme(self.bits)
        one_of("quantiser", self.quantiser, QUANTISERS)
        one_of("mix", self.mix, MIXES)
        one_of("ranks", self.ranks, RANKS)
        one_of("norm", self.norm, ("plain", "inputs", "both"))
        if self.factor_bits not in (4, 8):
            raise CompressError(f"factor_bits is {self.factor_bits}: compensators are stored in 4 or 8 bits")
        if self.budget and self.bytes:
            raise CompressError("can't provide both a budget in bits and bytes; choose one")
        if self.budget and self.budget < self.bits:
            raise CompressError(f"a budget of {self.budget:g} bits a weight is below the {self.bits} bits of the weights "
                                "alone")
        if min(self.rank_step, self.most_rank) < 1:
            raise CompressError(f"rank_step is {self.rank_step}, most_rank {self.most_rank}: at least 1")

    def scheme(self, bits: int) -> Scheme:
        """Of the weights."""
        return Scheme(bits, self.group, self.symmetric, ragged=True)

    @property
    def factors(self) -> Scheme:
        """Of compensators."""
        return factor_scheme(self.factor_bits, self.group)

    @property
    def needs(self) -> frozenset[str]:
        """The fields of `Calibration` it reads."""
        return norm_needs("both") | norm_needs("inputs")

    @property
    def widths(self) -> list[int]:
        """Bits that an expert may get."""
        return [self.bits] if self.mix == "uniform" else list(PLANES)

    def check_width(self, width: int) -> None:
        """Raise CompressError where the group does not divide the model width."""
        replace(self.scheme(self.bits), ragged=False).groups(width)


@dataclass(frozen=True)
class Offer:
    """An expert at one width of bits. `loss` is in the norm of gradients over all its tokens, `error` that of its outputs,
    relative."""

    bits: int
    bytes: int
    loss: float
    error: float


@dataclass(frozen=True)
class Lowered:
    """An expert in few bits, small facts alone: gather it over ranks.

    Attributes:
        bytes: without compensators; weights: numbers.
        shape: (F, D).
        gains: part -> what each further rank gives back, descending.
        kurtosis: of its weights, the mean over its matrices.
    """

    bytes: int
    weights: int
    shape: tuple[int, int]
    gains: Mapping[str, list[float]]
    kurtosis: float


def quantise(part: str, weight: torch.Tensor, calibration: Calibration, beam: Beam, bits: int) -> LowBit:
    """One matrix [F, D] in few bits, without a compensator."""
    transposed, scheme = part == "down", beam.scheme(bits)
    matrix = weight.t() if transposed else weight
    if beam.quantiser == "gptq":
        found = gptq(matrix, getattr(calibration, INPUTS[part]), scheme)
    else:
        found = (half_quadratic if beam.quantiser == "hqq" else round_to_nearest)(matrix, scheme)
    return LowBit(found, transposed)


def lower(expert: Expert, calibration: Calibration, beam: Beam, bits: int) -> dict[str, LowBit]:
    """All matrices of an expert in few bits, by part.

    Raises:
        CompressError: values that are not finite, a calibration of another expert, a group that does not divide the width.
    """
    expert.check()
    calibration.check(expert, beam.needs)
    beam.check_width(expert.width)
    return {part: quantise(part, weight, calibration, beam, bits) for part, weight in expert.parts.items()}


def offer(expert: Expert, calibration: Calibration, beam: Beam, bits: int, parts: Mapping[str, LowBit]) -> Offer:
    """What the expert in these forms takes and loses."""
    return Offer(bits, sum(matrix.bytes for matrix in parts.values()), measured_loss(expert, calibration, beam, parts),
                 relative_error(expert, calibration, beam, parts))


def measured_loss(expert: Expert, calibration: Calibration, beam: Beam, parts: Mapping[str, LowBit]) -> float:
    """Sum over matrices of the squared error in the norm of activations and gradients (see `moedist.compress.weighting`)."""
    total = 0.0
    for part, weight in expert.parts.items():
        norm = weighting(part, calibration, "both", beam.ridge)
        total += norm.scale * float(norm.apply(weight.double() - parts[part].dense(torch.float64)).square().sum())
    return total


def relative_error(expert: Expert, calibration: Calibration, beam: Beam, parts: Mapping[str, LowBit]) -> float:
    """Root of the mean over matrices of |(W - What) x|^2 / |W x|^2 over the tokens seen: the stated error of an expert."""
    found = []
    for part, weight in expert.parts.items():
        norm = weighting(part, calibration, "inputs", beam.ridge)
        size = float(norm.apply(weight.double()).square().sum())
        lost = float(norm.apply(weight.double() - parts[part].dense(torch.float64)).square().sum())
        found.append(lost / size if size else 0.0)
    return (sum(found) / len(found)) ** 0.5


def facts(expert: Expert, calibration: Calibration, beam: Beam, parts: Mapping[str, LowBit]) -> Lowered:
    """What `decide_ranks` must know of a lowered expert."""
    gains = {part: spectrum(weight.double() - parts[part].dense(torch.float64),
                            weighting(part, calibration, beam.norm, beam.ridge)).tolist()
             for part, weight in expert.parts.items()}
    kurtoses = [kurtosis(weight) for weight in expert.parts.values()]
    return Lowered(sum(matrix.bytes for matrix in parts.values()), expert.numbers, (expert.hidden, expert.width), gains,
                   sum(kurtoses) / len(kurtoses))


def kurtosis(weight: torch.Tensor) -> float:
    """Fourth moment over the squared second, about the mean: 3 for a normal distribution, more where there are outliers."""
    centred = weight.double() - weight.double().mean()
    square = centred.square()
    return float(square.square().mean() / square.mean().square()) if float(square.max()) > 0 else 0.0


def restore(expert: Expert, calibration: Calibration, beam: Beam, parts: Mapping[str, LowBit],
            ranks: Mapping[str, int]) -> Compressed:
    """The expert with compensators of these ranks."""
    found = {}
    for part, matrix in parts.items():
        if ranks[part]:
            residual = expert.parts[part].double() - matrix.dense(torch.float64)
            norm = weighting(part, calibration, beam.norm, beam.ridge)
            matrix = replace(matrix, compensator=compensate(residual, ranks[part], norm, beam.factors))
        found[part] = matrix
    return Compressed(expert.hidden, None, found)
