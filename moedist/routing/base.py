"""What a router is given, what it returns, and the steps that several routers share.

Shapes: G sequences of S tokens on this rank, T = G*S tokens, D width, E experts, K top-k, N rows (token, expert).

Two rules make every router give the same answer however the batch is spread over ranks: whatever looks across tokens
(capacity, expert choice, soft slots) stays within one sequence, and noise is a pure function of (seed, the token's place
in the global batch), never of a process's random state.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, ClassVar, Mapping, Optional

import torch
from torch import nn

from moedist.config import RouterConfig
from moedist.errors import ConfigError


@dataclass(frozen=True)
class RouterInput:
    """What a router may look at.

    Attributes:
        x_GSD: hidden states.
        vocab_ids_GS: token ids, for routers that hash them.
        keys_GS: int64 place of every token in the global batch, equal for any number of ranks.
        seed: changes with the step and the layer.
        training: False in evaluation and generation, where exploration noise is off.
        carried: what the router of the MoE layer before has handed on, [T, any]; None in the first.
        iteration: which pass through the layer this is, from 0 to `Router.iterations` - 1.
    """

    x_GSD: torch.Tensor
    vocab_ids_GS: torch.Tensor
    keys_GS: torch.Tensor
    seed: int
    training: bool
    carried: Optional[torch.Tensor] = None
    iteration: int = 0


@dataclass(frozen=True)
class Assignment:
    """Rows to send: token `token_ids_N[i]` goes to expert `expert_ids_N[i]` and comes back times `weights_N[i]`.

    Attributes:
        token_ids_N: int64, ascending; with `mix_in`, the index of a mixed row instead of a token.
        expert_ids_N: int64.
        weights_N: float32 or float64; carries the router's gradient.
        demand_E: int64 rows each expert was wanted for, before capacity dropped any; then those of the free ones.
        prob_sum_E: router probabilities summed over local tokens, for the balance loss; None where the router has none.
        aux_losses: name -> sum over local tokens of another loss, unweighted (see `Router.loss_weights`).
        stats: name -> detached sum over local tokens, for metrics.
        mix_in, mix_out: Soft MoE, [G, M, S] and [G, S, M]: rows = mix_in @ x, y = mix_out @ rows.
        shared_gate_T1: factor of the shared experts' output.
        direct_TD: added to the layer's output: what tokens get from experts that need no computing.
        carried: for the router of the next MoE layer, [T, any].
    """

    token_ids_N: torch.Tensor
    expert_ids_N: torch.Tensor
    weights_N: torch.Tensor
    demand_E: torch.Tensor
    prob_sum_E: Optional[torch.Tensor] = None
    aux_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    mix_in: Optional[torch.Tensor] = None
    mix_out: Optional[torch.Tensor] = None
    shared_gate_T1: Optional[torch.Tensor] = None
    direct_TD: Optional[torch.Tensor] = None
    carried: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class NoOptions:
    """A router without values of its own."""


class Router(nn.Module):
    """Base of all routers; a subclass gives `forward(RouterInput) -> Assignment`.

    Attributes:
        Options: frozen dataclass of what `router.options` may hold; fields are made by `moedist.config.key`, with a meaning.
        options: those of this router.
        causal: False where a token's route depends on later tokens of its sequence: perplexity is then optimistic, and
            generation differs from training.
        balances: whether its bias and its balance loss can aim at targets, for `router.balance_to=speed`; a router that says
            so uses `bias_step` for the one and leaves the other to the layer (`prob_sum_E`).
        targets_E: part of the rows that each expert is to get (CPU), as the plan in force says; None: equal parts. Set by the
            layer, not saved: the plan is.
        free_experts: how many entries `demand_E` has beyond the E, for experts that need no computing.
        shares_weights: whether routers of several layers use the same weights.
        iterations: how often tokens go through the layer, one pass after the other.
        draws: how often a batch goes through the whole model in a training pass, with other noise each time.
    """

    causal = True
    balances = False
    shares_weights = False
    free_experts = 0
    iterations = 1
    draws = 1
    targets_E: Optional[torch.Tensor] = None
    Options: ClassVar[type] = NoOptions

    def __init__(self, width: int, experts: int, top_k: int, config: RouterConfig, sequence: int):
        super().__init__()
        self.width, self.experts, self.top_k, self.config, self.sequence = width, experts, top_k, config, sequence
        self.options: Any = options_of(type(self), config)
        self.check()

    def check(self) -> None:
        """Raise ConfigError where E, K and the options do not go together, with the numbers and what to set instead."""

    def loss_weights(self) -> dict[str, float]:
        """What each of the losses in `Assignment.aux_losses`, and the balance loss, counts; a router with a loss of its own
        adds that."""
        return {"balance_loss": self.config.balance_loss, "z_loss": self.config.z_loss}

    def after_step(self, demand_E: torch.Tensor) -> None:
        """Called once after every optimizer step, on every rank alike, to update what is not learned by gradient.

        Args:
            demand_E: int64 rows that wanted each expert in that step, over all ranks (CPU).
        """

    def follow(self, first: "Router") -> None:
        """Called on the router of every MoE layer but the first, with that of the first: what is shared is that one's."""

    def take_place(self, place: int, layers: int) -> None:
        """Called where several layers share their experts: this is the router of the `place`-th of so many."""

    def most_rows_per_token(self) -> float:
        """Rows of a batch over its tokens, at most: for memory."""
        return float(self.top_k)

    def expected_rows_per_token(self) -> float:
        """The same once loads are balanced and whatever is scheduled is over: for planning."""
        return float(self.top_k)

    def balance_targets(self) -> Optional[torch.Tensor]:
        """Part of the rows that each entry of `demand_E` is to have, by which the balance loss goes; None: equal."""
        return self.targets_E

    def aimed_at(self, demand_E: torch.Tensor) -> torch.Tensor:
        """[E] (float64) rows that each expert should have got of these, by the targets: what a bias moves towards."""
        total, targets = demand_E.sum().double(), self.balance_targets()
        if targets is None:
            return (total / len(demand_E)).expand(len(demand_E))
        return total * targets.to(total)

    def bias_step(self, demand_E: torch.Tensor, rate: float) -> torch.Tensor:
        """[E] (float64) change of a balancing bias after a step with these rows, see `router.bias_rule`; `rate` at most."""
        missing_E = (aimed_E := self.aimed_at(demand_E)) - demand_E
        if self.config.bias_rule == "sign":
            return rate * torch.sign(missing_E)
        return rate * (missing_E / aimed_E.clamp(min=1e-9)).clamp(-1, 1)

    def extra_repr(self) -> str:
        return f"width={self.width}, experts={self.experts}, top_k={self.top_k}"


def options_of(router: type[Router], config: RouterConfig) -> Any:
    """`config.options` as the router's `Options`.

    Raises:
        ConfigError: an option that the router has not, with the nearest that it has.
    """
    names = [f.name for f in dataclasses.fields(router.Options)]
    for name in config.options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ConfigError(f"router.options has {name!r}, which router {config.name} has not; "
                              + (f"did you mean {near[0]!r}? (it has {', '.join(names)})" if near else "it has none"))
    return _typed(router.Options, config.options)


def _typed(options: type, values: Mapping[str, Any]) -> Any:
    made = options(**values)
    for f in dataclasses.fields(options):
        default, value = getattr(options(), f.name), getattr(made, f.name)
        number = isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
        if default is not None and not number and type(value) is not type(default):
            raise ConfigError(f"router.options: {f.name} is {value!r}; give a value such as {default!r}")
    return made


def router_dtype(x: torch.Tensor) -> torch.dtype:
    """Routing is done in float32 (float64 where the model is): a rounded logit sends a token to another expert."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def router_logits(x_GSD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """[T, E] scores x @ weight.T in `router_dtype`, outside autocast."""
    dtype = router_dtype(x_GSD)
    with torch.autocast(x_GSD.device.type, enabled=False):
        return x_GSD.flatten(0, 1).to(dtype) @ weight_ED.to(dtype).t()


def z_loss(logits_TE: torch.Tensor, config: RouterConfig) -> dict[str, torch.Tensor]:
    """Sum over tokens of logsumexp(logits)^2, the router z-loss of ST-MoE (Zoph et al. 2022, arXiv 2202.08906, eq. 5).

    Returns:
        {"z_loss": sum}, or nothing where its weight is 0.
    """
    return {"z_loss": logits_TE.logsumexp(-1).square().sum()} if config.z_loss else {}


def entropy_sum(probs_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the entropy (nats) of the routing distribution, detached."""
    return torch.special.entr(probs_TE.detach()).sum()


def demand(expert_ids: torch.Tensor, experts: int) -> torch.Tensor:
    """[E] number of rows that want each expert."""
    return torch.bincount(expert_ids.flatten(), minlength=experts)


def within_capacity(expert_ids_GSK: torch.Tensor, experts: int, capacity: int,
                    wanted_GSK: torch.Tensor | None = None) -> torch.Tensor:
    """Which rows fit when an expert takes at most `capacity` rows of one sequence.

    First choices are served before second ones, earlier tokens before later ones (GShard, Lepikhin et al. 2020, arXiv
    2006.16668, algorithm 1, with one sequence as the group).

    Args:
        wanted_GSK: rows that are there at all; None: all.

    Returns:
        bool [G, S, K].
    """
    g, s, k = expert_ids_GSK.shape
    served = expert_ids_GSK.transpose(1, 2).reshape(g, k * s)  # all first choices, then all second choices
    one_hot = torch.nn.functional.one_hot(served, experts)
    if wanted_GSK is not None:
        one_hot = one_hot * wanted_GSK.transpose(1, 2).reshape(g, k * s, 1)
    place = (one_hot.cumsum(1) - 1).gather(2, served.unsqueeze(2)).squeeze(2)
    fits_GSK = (place < capacity).view(g, k, s).transpose(1, 2)
    return fits_GSK if wanted_GSK is None else fits_GSK & wanted_GSK


def even_share(sequence: int, top_k: float, experts: int, factor: float) -> int:
    """Rows of one sequence per expert at capacity factor `factor`: ceil(factor * S * K / E), at least 1."""
    return max(1, -int(-factor * sequence * top_k // experts))


def rows_of_tokens(inputs: RouterInput, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int,
                   capacity_factor: float, wanted_TK: torch.Tensor | None = None, per_token: float | None = None,
                   **more) -> Assignment:
    """The assignment of token-choice routing: every token goes to its K experts, less what capacity drops.

    Args:
        expert_ids_TK: best first.
        wanted_TK: where tokens go to various numbers of experts, which of the K are meant; None: all.
        per_token: rows of a token on average, of which capacity is the even share; None: K.
        more: the other fields of the assignment.
    """
    g, s = inputs.vocab_ids_GS.shape
    t, k = expert_ids_TK.shape
    token_ids_TK = torch.arange(t, device=expert_ids_TK.device).unsqueeze(1).expand(t, k)
    flat = (token_ids_TK, expert_ids_TK, weights_TK)
    stats = dict(more.pop("stats", {}))
    keep_TK, wanted = wanted_TK, expert_ids_TK if wanted_TK is None else expert_ids_TK[wanted_TK]
    if capacity_factor > 0:
        capacity = even_share(s, k if per_token is None else per_token, experts, capacity_factor)
        keep_TK = within_capacity(expert_ids_TK.view(g, s, k), experts, capacity,
                                  None if wanted_TK is None else wanted_TK.view(g, s, k)).reshape(t, k)
        stats["dropped_rows"] = wanted.numel() - keep_TK.sum()
    if keep_TK is not None:
        flat = tuple(v[keep_TK] for v in flat)
    return Assignment(*(v.reshape(-1) for v in flat), demand_E=demand(wanted, experts), stats=stats, **more)


def scaled_to_one(weights_TK: torch.Tensor, wanted_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Weights over their sum in each token; those that are not wanted become 0, and a token with none keeps zeros."""
    if wanted_TK is not None:
        weights_TK = weights_TK * wanted_TK
        return weights_TK / (weights_TK.sum(-1, keepdim=True) + (~wanted_TK.any(-1, keepdim=True)))
    return weights_TK / weights_TK.sum(-1, keepdim=True)
