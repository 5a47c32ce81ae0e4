"""Joint CUR: one set of hidden neurons per expert, the same rows of gate, up and down, so a smaller expert.

An expert is up and gate (rows: what a neuron reads) followed by down (rows: what it writes). Choosing one index set J
for all three is a CUR decomposition of the whole expert whose C and R are real weights of real neurons, and whose U can
be absorbed into down. Cost: (2 or 3) J D numbers and J indices; nothing changes in the kernels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from moedist.compress.calibration import Calibration
from moedist.compress.expert import Expert
from moedist.compress.matrices import Dense
from moedist.compress.method import Compressed, Curve, Keep, Method, kept_units, one_of
from moedist.compress.select import weighted_greedy
from moedist.compress.weighting import Weighting, weighting
from moedist.errors import CompressError

DEFAULT_RIDGE = 1e-3
SILENT = 1e-4


def magnitude(expert: Expert) -> torch.Tensor:
    """float64 [F] product of the norms of a neuron's weights, unchanged by scaling up against down."""
    scores = [matrix.double().norm(dim=1) for matrix in expert.parts.values()]
    return torch.stack(scores).prod(0)


def fit_down(down: torch.Tensor, hidden_moment: torch.Tensor, kept: torch.Tensor,
             ridge: float = DEFAULT_RIDGE) -> torch.Tensor:
    """What the kept neurons must write to stand in for those that are dropped, by least squares.

    The minimiser of sum over tokens |h down - h_J down'|^2 + ridge * sum_j E_j |down'_j - down_j|^2, A the hidden
    second moment and E its diagonal, is down' = down_J + (A_JJ + ridge diag E)^-1 A_JK down_K, K the dropped neurons:
    for ridge -> 0 the same as A_JJ^-1 A_J: down (the reconstruction step of He, Zhang & Sun 2017, arXiv 1707.06168,
    section 3.1). The ridge is relative to each neuron's own energy, so scaling a neuron against its down row changes
    nothing; it pulls towards the trained weights, so a neuron that never fired keeps its own. E has a floor of SILENT
    times its mean: one that hardly fired could otherwise be told to shout in place of the loud. Solved in float64 on
    correlations.

    Args:
        down: [F, D].
        hidden_moment: [F, F] sum of h h^T.
        kept: int64 [J].
        ridge: above 0; larger for few tokens.

    Returns:
        [J, D] in the dtype of `down`; equal to it, bitwise, when all neurons are kept.
    """
    dropped = torch.ones(len(down), dtype=torch.bool, device=down.device)
    dropped[kept] = False
    if not dropped.any():
        return down[kept]
    inverse, of_kept, factor = _correlations(hidden_moment, kept, ridge)
    correction = torch.cholesky_solve(of_kept[:, dropped] @ down[dropped].double(), factor)
    return (down[kept].double() + inverse.unsqueeze(1) * correction).to(down.dtype)


def _correlations(hidden_moment: torch.Tensor, kept: torch.Tensor,
                  ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 (E^-1/2 [J], E^-1/2 A_J: [J, F], Cholesky factor of E^-1/2 (A_JJ + ridge diag E) E^-1/2), see `fit_down`."""
    moment = hidden_moment.double()
    energy = moment.diagonal()[kept].clamp(min=0)
    inverse = torch.where(energy > 0, energy.rsqrt(), 0.0)
    lift = (SILENT * energy.mean() * inverse.square()).clamp(1.0, 1e100)
    of_kept = inverse.unsqueeze(1) * moment[kept]
    correlation = of_kept[:, kept] * inverse
    correlation = (correlation + correlation.t()) / 2
    correlation.diagonal().copy_(1 + ridge * lift)  # of a dead neuron too: its right-hand side is zero
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if failed:
        raise CompressError(f"the hidden second moment of {len(kept)} kept neurons is not positive: raise the ridge "
                            f"above {ridge:g}, or calibrate in a wider dtype")
    return inverse, of_kept, factor


@dataclass(frozen=True)
class StandIns:
    """Who stands in for the K neurons that were dropped, ascending; the S kept ones that do most of it, most first.

    Attributes:
        positions: int64 [K, S], of kept neurons, counted among all F.
        weights: float64 [K, S]: h_k is taken for the sum of weight * h_j, so weight * down_k is added to down_j.
        explained: float64 [K], share of the energy of h_k, summed over tokens, that all kept ones together restore; 1 for
            a neuron that never fired.
    """

    positions: torch.Tensor
    weights: torch.Tensor
    explained: torch.Tensor


def stand_ins(hidden_moment: torch.Tensor, kept: torch.Tensor, ridge: float = DEFAULT_RIDGE, most: int = 3,
              block: int = 256) -> StandIns:
    """The map behind `fit_down`, C = (A_JJ + ridge diag E)^-1 A_JK, told neuron by neuron.

    Neurons differ in scale, so a kept one counts by what it contributes, |C_jk| sqrt(A_jj): the size of weight * h_j.

    Args:
        hidden_moment: [F, F] sum of h h^T.
        kept: int64 [J].
        most: S, or J where that is less.
        block: dropped neurons at a time: takes 2 J * block numbers beside the J^2 of the factor.
    """
    dropped = torch.ones(len(hidden_moment), dtype=torch.bool, device=hidden_moment.device)
    dropped[kept] = False
    most, of_all = min(most, len(kept)), dropped.nonzero().squeeze(1)
    inverse, of_kept, factor = _correlations(hidden_moment, kept, ridge)
    moment_JJ, energy = of_kept[:, kept] * inverse, hidden_moment.diagonal().double()
    parts = []
    for names in of_all.split(block):
        right = of_kept[:, names]
        scaled = torch.cholesky_solve(right, factor)  # sqrt(E) C
        order = scaled.abs().sort(dim=0, descending=True, stable=True).indices[:most]
        missing = energy[names] - 2 * (scaled * right).sum(0) + (scaled * (moment_JJ @ scaled)).sum(0)
        explained = torch.where(energy[names] > 0, 1 - missing / energy[names], 1.0)
        weights = (inverse.unsqueeze(1) * scaled).gather(0, order)
        parts.append((kept[order].t(), weights.t(), explained))
    if not parts:
        none = energy.new_zeros(0, most)
        return StandIns(none.long(), none, none.new_zeros(0))
    return StandIns(*(torch.cat(part) for part in zip(*parts)))


@dataclass(frozen=True)
class JointMethod(Method):
    """Whole hidden neurons by a score; a subclass gives the ranking.

    Attributes:
        multiple: widths are multiples of it (or F itself), as the kernels like.
        least_squares: fit down to the dropped neurons (`fit_down`).
        ridge: of that fit.
    """

    multiple: int = 8
    least_squares: bool = True
    ridge: float = DEFAULT_RIDGE

    def __post_init__(self) -> None:
        if self.multiple < 1 or not self.ridge > 0:
            raise CompressError(f"multiple is {self.multiple}, ridge {self.ridge:g}: at least 1, and above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hidden_moment"} if self.least_squares else ())

    @abstractmethod
    def rank(self, expert: Expert, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [F] neurons, best first, and the float64 [F] worth of each in that order."""

    def gains(self, expert: Expert, calibration: Calibration, decided: Keep) -> list[Curve]:
        self.check(expert, calibration)
        units, per_unit = expert.hidden, len(expert.parts) * expert.width
        numbers = tuple(n * per_unit for n in range(units + 1))
        indices = (*range(units), 0)  # all neurons in their own order need no names
        gain = self.rank(expert, calibration)[1].cpu()
        return [Curve("neurons", gain, numbers, indices, min(self.multiple, units))]

    def compress(self, expert: Expert, calibration: Calibration, keep: Keep) -> Compressed:
        self.check(expert, calibration)
        kept = kept_units(keep, "neurons", expert.hidden)
        if kept == expert.hidden:
            return Compressed(expert.hidden, None, {part: Dense(matrix) for part, matrix in expert.parts.items()})
        neurons = self.rank(expert, calibration)[0][:kept].sort().values
        parts = dict(expert.select(neurons).parts)
        if self.least_squares:
            parts["down"] = fit_down(expert.down, calibration.hidden_moment, neurons, self.ridge)
        return Compressed(expert.hidden, neurons.int(), {part: Dense(matrix) for part, matrix in parts.items()})


SELECTIONS = ("greedy", "fisher")
NORM_RIDGE = 1e-6  # relative, of the weights of the norm that gains are measured in


@dataclass(frozen=True)
class Cur(JointMethod):
    """The default: the neurons that the loss misses most, with the least-squares down projection.

    What a neuron is worth is what it adds to those kept before it: by how much the error of the expert's output falls, in
    the norm of output gradients (`moedist.compress.weighting`, "both") and after the least-squares step. That is an
    estimate of loss, comparable over experts and layers, so one ranking serves all. Fisher scores added up are not: they
    count what other neurons could stand in for, which differs between layers (at 70 % of a small model the perplexity was
    1.31 times the uncompressed with their sums, 1.06 with the same neurons worth what they add).

    Attributes:
        selection: the order. "greedy": always the neuron that adds most (`moedist.compress.select.weighted_greedy`,
            O(F^2 (F + D)) an expert). "fisher": by the score sum over tokens of (h_j dL/dh_j)^2, twice the Fisher estimate
            of the rise in loss without neuron j (Theis et al. 2018, arXiv 1801.05787; with one token a sample, the gate
            score of Molchanov et al. 2019, arXiv 1906.10771, eq. 8).

    Without `least_squares` the order is by Fisher score, which is then also what a neuron is worth. An expert that has seen
    no tokens is worth nothing against others and is ranked by magnitude within.
    """

    selection: str = "greedy"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("selection", self.selection, SELECTIONS)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"fisher"} | ({"output_grad_moment"} if self.least_squares else set())

    def rank(self, expert: Expert, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
        fisher = calibration.fisher.double()
        if not fisher.any():
            return magnitude(expert).sort(descending=True, stable=True).indices, fisher
        by_fisher = fisher.sort(descending=True, stable=True).indices
        if not self.least_squares:
            return by_fisher, fisher[by_fisher]
        norm = weighting("down", calibration, "both", NORM_RIDGE)
        order = by_fisher
        if self.selection == "greedy":
            order = weighted_greedy(norm.apply_left(torch.eye(expert.hidden, dtype=torch.float64, device=fisher.device)),
                                    norm.apply_right(expert.down.double()), expert.hidden)
        return order, added(expert.down, order, norm)


def added(down: torch.Tensor, order: torch.Tensor, norm: Weighting) -> torch.Tensor:
    """float64 [F]: by how much each further neuron of `order` lowers the squared error of the expert's output in the norm,
    the kept ones at their least-squares best. They sum to the squared norm of the output."""
    hidden = norm.apply_left(torch.eye(len(down), dtype=torch.float64, device=down.device))[:, order]
    directions = torch.linalg.qr(hidden).Q
    return norm.scale * (directions.t() @ norm.apply(down.double())).square().sum(1)


@dataclass(frozen=True)
class PruneMagnitude(JointMethod):
    """Baseline: neurons by the squared product of their weights' norms, without tokens (Li et al. 2017, 1608.08710)."""

    least_squares: bool = False

    def rank(self, expert: Expert, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
        ranked = magnitude(expert).square().sort(descending=True, stable=True)
        return ranked.indices, ranked.values


@dataclass(frozen=True)
class PruneRandom(JointMethod):
    """Baseline: random neurons, all worth the same, so that every expert loses the same share.

    Attributes:
        seed: of the order, which is the same for all experts of one width.
    """

    least_squares: bool = False
    seed: int = 0

    def rank(self, expert: Expert, calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(expert.hidden, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        order = order.to(expert.up.device)
        return order, torch.ones(expert.hidden, dtype=torch.float64, device=order.device)
