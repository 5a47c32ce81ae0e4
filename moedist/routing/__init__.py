"""How tokens choose experts: one router a file, one interface (`base`), found by name here.

Pure: tensors in, tensors out. A router knows nothing of ranks, and gives the same answer however the batch is spread.
"""

import dataclasses

import torch

from moedist.config import Config, RouterConfig
from moedist.errors import ConfigError
from moedist.routing.base import Assignment, Router, RouterInput, options_of
from moedist.routing.comet import CometRouter
from moedist.routing.deepseek_moe import DeepSeekMoERouter
from moedist.routing.dynmole import DynMoLERouter
from moedist.routing.chain import ChainRouter
from moedist.routing.expert_choice import ExpertChoiceRouter
from moedist.routing.group_limited import GroupLimitedRouter
from moedist.routing.grouped import GroupedRouter
from moedist.routing.hash import HashRouter
from moedist.routing.loss_free import LossFreeRouter
from moedist.routing.losses import balance_loss_sum
from moedist.routing.noise import mix_seeds
from moedist.routing.null_experts import NullExpertsRouter
from moedist.routing.progressive import ProgressiveRouter
from moedist.routing.moe_plus_plus import MoEPlusPlusRouter
from moedist.routing.random import RandomRouter
from moedist.routing.recurrent import RecurrentRouter
from moedist.routing.rexmoe import ReXMoERouter
from moedist.routing.shared_expert import SharedExpertRouter
from moedist.routing.sigma_moe import SigmaMoERouter
from moedist.routing.sinkhorn import SinkhornRouter
from moedist.routing.soft_moe import SoftMoERouter
from moedist.routing.stochastic_topk import StochasticTopKRouter
from moedist.routing.switch import SwitchRouter
from moedist.routing.top_p import TopPRouter
from moedist.routing.thor import ThorRouter
from moedist.routing.topk import TopKRouter
from moedist.routing.trust import most_trusted

ROUTERS: dict[str, type[Router]] = {
    "random": RandomRouter,
    "topk": TopKRouter,
    "switch": SwitchRouter,
    "stochastic_topk": StochasticTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "soft_moe": SoftMoERouter,
    "hash": HashRouter,
    "shared_expert": SharedExpertRouter,
    "top_p": TopPRouter,
    "null_experts": NullExpertsRouter,
    "deepseek_moe": DeepSeekMoERouter,
    "loss_free": LossFreeRouter,
    "grouped": GroupedRouter,
    "group_limited": GroupLimitedRouter,
    "sinkhorn": SinkhornRouter,
    "comet": CometRouter,
    "dynmole": DynMoLERouter,
    "progressive": ProgressiveRouter,
    "sigma_moe": SigmaMoERouter,
    "moe_plus_plus": MoEPlusPlusRouter,
    "recurrent": RecurrentRouter,
    "chain": ChainRouter,
    "thor": ThorRouter,
    "rexmoe": ReXMoERouter,
}


def build_router(width: int, experts: int, top_k: int, config: RouterConfig, sequence: int) -> Router:
    """The router called `config.name` for training sequences of `sequence` tokens, weights not yet initialised."""
    return ROUTERS[config.name](width, experts, top_k, config, sequence)


def router_of(config: Config) -> Router:
    """The router of a layer without memory for its weights, to ask what it needs.

    Raises:
        ConfigError: its options are unknown or do not go with the model.
    """
    m = config.model
    with torch.device("meta"):
        return build_router(m.width, m.experts, m.top_k, config.router, config.data.sequence_length)


def describe_options() -> str:
    """What `router.options` may hold, as text for `--help`, router by router."""
    lines = []
    for name, router in sorted(ROUTERS.items()):
        for f in dataclasses.fields(router.Options):
            lines.append(f"  {name}: {f.name}={getattr(router.Options(), f.name)}\n      {f.metadata['help']}")
    return "\n".join(lines)


def check_router(config: Config) -> None:
    """Raise ConfigError where the router's options are unknown or do not go with the model; before any process starts."""
    r = config.router
    if r.balance_to == "speed" and not ROUTERS[r.name].balances:
        balancing = ", ".join(name for name, router in sorted(ROUTERS.items()) if router.balances)
        raise ConfigError(f"router.balance_to=speed: router {r.name} cannot aim at loads; set "
                          f"router.balance_to=equal, or router.name to one of {balancing}")
    if ROUTERS[r.name].shares_weights and config.engine.zero_stage == 3:
        raise ConfigError(f"router {r.name} has weights that several layers use, which ZeRO-3 would have partitioned in "
                          "between; set engine.zero_stage=2")
    router_of(config)


__all__ = ["ROUTERS", "Assignment", "Router", "RouterInput", "balance_loss_sum", "build_router", "check_router",
           "describe_options", "mix_seeds", "most_trusted", "options_of", "router_of"]
