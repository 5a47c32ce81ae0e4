"""The architectures of `transformers` that this model can be, and how they differ. All else is the same in all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping

from moedist.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type, architecture: what a config.json calls it.
        sparse: whether it has experts.
        qk_norm: `model.qk_norm` of all its models.
        block: name of the feed-forward with experts in a block.
        projections: names of an expert's gate, up and down projection.
        expert_width: key of F, the hidden width of an expert.
        expert_counts: keys of E that versions of transformers use, the one to write first.
        normalizes: whether the K weights of a token are always scaled to sum to one; else norm_topk_prob says so.
        any_block: whether some blocks may be dense.
        defaults: what a config.json means that leaves a key out.
    """

    model_type: str
    architecture: str
    sparse: bool
    qk_norm: str = "none"
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_width: str = "intermediate_size"
    expert_counts: tuple[str, ...] = ()
    normalizes: bool = False
    any_block: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {family.model_type: family for family in (
    Family("mixtral", "MixtralForCausalLM", True, block="block_sparse_moe", projections=("w1", "w3", "w2"),
           expert_counts=("num_local_experts",), normalizes=True,
           defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 8}),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", True, qk_norm="head", expert_width="moe_intermediate_size",
           expert_counts=("num_experts", "num_local_experts"), any_block=True,
           defaults={"num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768}),
    Family("olmoe", "OlmoeForCausalLM", True, qk_norm="all", expert_counts=("num_experts", "num_local_experts"),
           defaults={"rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64}),
    Family("llama", "LlamaForCausalLM", False),
    Family("mistral", "MistralForCausalLM", False),
    Family("qwen3", "Qwen3ForCausalLM", False, qk_norm="head"),
)}
SPARSE = [family.model_type for family in FAMILIES.values() if family.sparse]
DENSE = [family.model_type for family in FAMILIES.values() if not family.sparse]


def family_of(source: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json names.

    Raises:
        ConfigError: another one.
    """
    found = FAMILIES.get(source.get("model_type", ""))
    if found is None:
        raise ConfigError(f"{where}: model_type is {source.get('model_type')!r}; supported are {', '.join(SPARSE)}, and with "
                          f"--upcycle {', '.join(DENSE)}")
    return found
