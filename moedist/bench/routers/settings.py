"""What is trained and how much is measured: shapes, budgets, and what each router needs to be compared with the others."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from moedist.config import Config, RouterConfig, config_from_dict
from moedist.errors import ConfigError
from moedist.routing import ROUTERS

# Balanced without a loss, in the table beside the routers by name. The usual rate of 0.001 is for tens of thousands of steps:
# in a few hundred, biases that move so slowly arrive nowhere.
BALANCED = "topk+bias_rate=0.01+bias_rule=proportional+balance_loss=0"


def _finer(config: Config) -> list[str]:
    """Twice as many experts of half the width, and one of a token's 2K taken by the shared one: as many FLOPs."""
    m = config.model
    return ["model.shared_experts=1", f"model.experts={2 * m.experts}", f"model.top_k={2 * m.top_k - 1}",
            f"model.expert_hidden={m.expert_hidden // 2}"]


def _pooled(config: Config) -> list[str]:
    """The same experts, of as few layers as can be in one pool, which is open before the routing is compared with itself."""
    layers = len(config.routed_layers())
    pool = next((n for n in range(2, layers + 1) if layers % n == 0), 2)
    return [f"model.pool_layers={pool}", f"model.experts={pool * config.model.experts}",
            f"router.options.steps={config.train_steps // 2}"]


# What a router needs that the others do not have, given what all have in common; everything else is the same for all.
NEEDS: dict[str, Callable[[Config], list[str]]] = {
    "switch": lambda config: ["model.top_k=1"],
    "shared_expert": lambda config: ["model.shared_experts=1"],
    "deepseek_moe": _finer,
    "loss_free": lambda config: ["router.options.update_rate=0.01"],  # as for BALANCED
    "group_limited": lambda config: ["router.options.update_rate=0.01"],
    # schedules that are over before the routing is compared with itself
    "progressive": lambda config: [f"router.options.steps={config.train_steps // 2}"],
    "rexmoe": _pooled,
    "comet": lambda config: [f"router.options.permutation_steps={config.train_steps // 3}"],
}


@dataclass(frozen=True)
class Budget:
    """How much is done.

    Attributes:
        name: full or quick.
        config: of the training, without router, seed and folder.
        steps: of each training; seeds: trainings of each router.
        prompts, prompt_tokens, new_tokens: of the text that is generated.
        rounds: of the timings, all routers in turn.
    """

    name: str
    config: dict[str, Any]
    steps: int
    seeds: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    rounds: int


_ALL: dict[str, Any] = {
    "placement": {"planner": "equal"}, "checkpoint": {"keep": 1, "asynchronous": False},
    "monitor": {"wandb": "disabled", "output": "quiet"},
}
FULL = Budget("full", {
    **_ALL, "data": {"tokenizer": "bpe", "vocab": 1024, "sequence_length": 128},
    "model": {"layers": 3, "width": 96, "heads": 4, "kv_heads": 2, "experts": 8, "top_k": 2, "expert_hidden": 96},
    # at 3e-3 perplexities of nearly equal routers were 84 to 120: more chance than router
    "train": {"batch": 16, "lr": 1e-3, "warmup_steps": 20},
}, steps=300, seeds=3, prompts=32, prompt_tokens=16, new_tokens=40, rounds=5)
QUICK = Budget("quick", {
    **_ALL, "data": {"tokenizer": "bpe", "vocab": 512, "sequence_length": 64, "max_documents": 200},
    "model": {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_hidden": 64},
    "train": {"batch": 16, "lr": 3e-3, "warmup_steps": 10, "eval_tokens": 8192},
}, steps=80, seeds=1, prompts=8, prompt_tokens=16, new_tokens=32, rounds=5)


def default_variants() -> list[str]:
    """Every router by name, and TopK balanced without a loss."""
    return [*ROUTERS, BALANCED]


def base_config(budget: Budget, folder: str, overrides: Sequence[str] = ()) -> Config:
    """What all trainings have in common.

    Raises:
        ConfigError: an unknown key.
    """
    return config_from_dict(budget.config, [*overrides, f"phases=[{{train: {budget.steps}}}]", f"folder={folder}"],
                            "the bench")


def config_of(budget: Budget, variant: str, seed: int, folder: str, overrides: Sequence[str] = ()) -> Config:
    """The training of one router with one seed.

    Args:
        variant: see `parse_variant`; its options come after what the router needs, that after `overrides`, and those after
            the budget.

    Raises:
        ConfigError: an unknown router, key or option.
    """
    name, options = parse_variant(variant)
    needs = needs_of(name, base_config(budget, folder, overrides))
    return config_from_dict(budget.config, [
        *overrides, f"router.name={name}", *needs, *options, f"seed={seed}", f"phases=[{{train: {budget.steps}}}]",
        f"name={file_name(variant)}-seed{seed}", f"folder={folder}"], f"the bench and {variant}")


def needs_of(router: str, base: Config) -> list[str]:
    """What it needs beside `base`, as overrides."""
    return NEEDS[router](base) if router in NEEDS else []


def parse_variant(variant: str) -> tuple[str, list[str]]:
    """`NAME+KEY=VALUE+...` as the name of a router and overrides of a configuration.

    A key with a dot is one of the configuration, one of the section `router` is taken from there, others are options of the
    router.

    >>> parse_variant("switch+capacity_factor=2")
    ('switch', ['router.capacity_factor=2'])

    Raises:
        ConfigError: an unknown router, or an option without a value.
    """
    name, *options = variant.split("+")
    if name not in ROUTERS:
        near = difflib.get_close_matches(name, ROUTERS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no router {name!r}; did you mean {near!r}? (there are {', '.join(ROUTERS)})")
    common = {f.name for f in dataclasses.fields(RouterConfig)} - {"name", "options"}
    found = []
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals:
            raise ConfigError(f"{variant!r}: write an option as KEY=VALUE, not {option!r}, such as {BALANCED}")
        found.append(("" if "." in key else "router." if key in common else "router.options.") + option)
    return name, found


def file_name(variant: str) -> str:
    """A variant as the name of a file."""
    return re.sub(r"[^\w.=+-]", "-", variant)
