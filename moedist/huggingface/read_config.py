"""What a config.json means here: keys of a configuration, notices, and refusals of what the model cannot be."""

from __future__ import annotations

from typing import Any, Mapping, NoReturn

from moedist.errors import ConfigError
from moedist.huggingface.families import Family

LONGEST = 2048  # tokens of a training sequence where nobody says otherwise: memory, not the model, is the limit
FINE_TUNING_LR = 2e-5  # the default of a new model would undo the training of this one
MUST_BE = {  # key -> (values that this model has anyway, what is supported, for people)
    "hidden_act": (("silu", "swish", None), "experts are SwiGLU here, so only 'silu'"),
    "attention_bias": ((False, None), "projections have no biases here, so only false"),
    "mlp_bias": ((False, None), "projections have no biases here, so only false"),
    "quantization_config": ((None,), "only float32, float16, bfloat16 and float64 weights; dequantise them first"),
    "partial_rotary_factor": ((1, None), "rotary positions turn whole heads here, so only 1"),
}
ONLY_TRAINING = ("attention_dropout", "router_jitter_noise")  # what they change is seen in training alone


def read_config(source: Mapping[str, Any], family: Family, where: str) -> tuple[dict[str, Any], list[str]]:
    """(tree of a configuration: model, router, data, train; notices for people).

    A dense model gives no keys of experts: they come from `moedist.huggingface.upcycle`.

    Args:
        source: the config.json; where: its path, for messages.

    Raises:
        ConfigError: a key is missing, or has a value that the model here cannot have; names key, value and way out.
    """
    def get(key: str, *default: Any) -> Any:
        if source.get(key) is not None:
            return source[key]
        if key not in family.defaults and not default:
            raise ConfigError(f"{where} has no {key}; it is not a whole configuration of {family.model_type}")
        return family.defaults.get(key, *default)

    for key, (allowed, supported) in MUST_BE.items():
        if source.get(key) not in allowed:
            refuse(where, key, source[key], supported)
    heads, head_dim = get("num_attention_heads"), source.get("head_dim")
    model = {"layers": get("num_hidden_layers"), "width": get("hidden_size"), "heads": heads,
             "kv_heads": get("num_key_value_heads", heads), "head_width": head_dim, "qk_norm": family.qk_norm,
             "clip_qkv": source.get("clip_qkv"), "vocab": get("vocab_size"), "rope_base": rope_base(source, family, where),
             "norm_eps": get("rms_norm_eps", 1e-6), "tie_embeddings": get("tie_word_embeddings", False),
             "init_std": get("initializer_range", 0.02), "activation": "swiglu", "ffn_hidden": get("intermediate_size")}
    router: dict[str, Any] = {"name": "topk", "normalize": True}
    if family.sparse:
        count = next((source[key] for key in family.expert_counts if source.get(key) is not None), None)
        model |= {"experts": get(family.expert_counts[0]) if count is None else count, "top_k": get("num_experts_per_tok"),
                  "expert_hidden": get(family.expert_width), "shared_experts": 0}
        model |= {"moe_every": get("decoder_sparse_step", 1), "dense_blocks": sorted(get("mlp_only_layers", []))} \
            if family.any_block else {}
        router["normalize"] = family.normalizes or get("norm_topk_prob", False)
        # theirs sums over the K choices and is K at perfect balance, ours is 1
        router["balance_loss"] = get("router_aux_loss_coef", 0.001) * model["top_k"]
    longest = min(get("max_position_embeddings", LONGEST), window_of(source) or LONGEST, LONGEST)
    notices = [f"{key}={source[key]:g} of {where} is left out: it changes training alone; see model.dropout"
               for key in ONLY_TRAINING if source.get(key)]
    return {"model": model, "router": router, "data": {"sequence_length": longest},
            "train": {"lr": FINE_TUNING_LR}}, notices


def rope_base(source: Mapping[str, Any], family: Family, where: str) -> float:
    """Base of the rotary positions, of either way to write them: rope_theta and rope_scaling, or rope_parameters."""
    for key in ("rope_parameters", "rope_scaling"):
        settings = source.get(key) or {}
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            refuse(where, f"{key}.rope_type", kind, "positions are not scaled here, so only 'default'")
        if settings.get("partial_rotary_factor", 1) != 1:
            refuse(where, f"{key}.partial_rotary_factor", settings["partial_rotary_factor"], "only 1: heads turn as a whole")
    return float((source.get("rope_parameters") or {}).get("rope_theta") or source.get("rope_theta")
                 or family.defaults.get("rope_theta", 1e4))


def window_of(source: Mapping[str, Any]) -> int | None:
    """Tokens that attention looks back, None: all. A Qwen says so without meaning it unless use_sliding_window is true."""
    if not source.get("use_sliding_window", True):
        return None
    return source.get("sliding_window")


def refuse_window(source: Mapping[str, Any], sequence_length: int, where: str) -> None:
    """Raise `ConfigError` where a training sequence is longer than the window: attention here sees all of it."""
    window = window_of(source)
    if window is not None and window < sequence_length:
        raise ConfigError(f"{where}: sliding_window is {window}, and attention here sees the whole sequence of "
                          f"{sequence_length} tokens; set data.sequence_length={window} or less, for which both are the same")


def refuse(where: str, key: str, value: Any, supported: str) -> NoReturn:
    """Raise `ConfigError` for a value of a config.json."""
    raise ConfigError(f"{where}: {key} is {value!r}, which this model cannot have; {supported}")
