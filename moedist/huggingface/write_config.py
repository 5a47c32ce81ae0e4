"""The config.json, generation_config.json and tokenizer_config.json of a run, in the architecture that its model fits."""

from __future__ import annotations

from typing import Any, Mapping

from moedist.config import Config
from moedist.data import Tokenizer
from moedist.errors import ConfigError
from moedist.huggingface.families import FAMILIES, SPARSE, Family

CARRIED = (  # mean the same in all architectures
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "sliding_window",
    "use_sliding_window", "use_cache", "rope_parameters", "rope_theta", "dtype", "torch_dtype")


def choose_family(config: Config, wanted: str | None = None) -> Family:
    """The architecture that computes what this model computes.

    Args:
        wanted: a model_type; None: the one that fits.

    Raises:
        ConfigError: none does, or not that one; names what does not fit.
    """
    if wanted is not None and wanted not in SPARSE:
        raise ConfigError(f"--architecture is {wanted!r}; choose one of {', '.join(SPARSE)}")
    general = _misfits(config)
    if general:
        raise ConfigError(f"no architecture of transformers that is written here has {'; '.join(general)}")
    choices = [FAMILIES[wanted]] if wanted else [FAMILIES[name] for name in SPARSE]
    reasons = {family.model_type: _misfits_of(config, family) for family in choices}
    for family in choices:
        if not reasons[family.model_type]:
            return family
    raise ConfigError("the model does not fit " + "; nor ".join(f"{name} ({', '.join(why)})" for name, why in reasons.items()))


def _misfits(config: Config) -> list[str]:
    """What no architecture has."""
    m, r = config.model, config.router
    found = {
        "a dense model (model.moe_every=0)": not config.moe_layers(),
        f"model.activation={m.activation}": m.activation != "swiglu",
        f"model.shared_experts={m.shared_experts}": m.shared_experts > 0,
        f"model.pool_layers={m.pool_layers}, experts that layers share": m.pool_layers > 1,
        f"router.name={r.name} (topk fits)": r.name != "topk",
        f"router.bias_rate={r.bias_rate:g}, a bias that chooses experts (router.bias_rate=0 leaves it out)": r.bias_rate > 0,
    }
    return [what for what, misfit in found.items() if misfit]


def _misfits_of(config: Config, family: Family) -> list[str]:
    """What this one has not."""
    m, olmoe = config.model, family.model_type == "olmoe"
    some_dense = len(config.moe_layers()) < m.layers
    found = {
        f"model.qk_norm={m.qk_norm}, there {family.qk_norm}": m.qk_norm != family.qk_norm,
        f"model.clip_qkv={m.clip_qkv}": m.clip_qkv is not None and not olmoe,
        "router.normalize=false": family.normalizes and not config.router.normalize,
        f"model.moe_every={m.moe_every} and model.dense_blocks={m.dense_blocks}": some_dense and not family.any_block,
        f"model.head_width={m.head_width} apart from width / heads": olmoe and m.head * m.heads != m.width,
    }
    return [what for what, misfit in found.items() if misfit]


def config_json(config: Config, family: Family, hidden: int, vocab: int, dtype: str, tokenizer: Tokenizer,
                origin: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json.

    Args:
        hidden: F, of every expert; vocab: V, rows of the embedding.
        dtype: that most tensors are written in, by name.
        origin: config.json of the model that was imported, or empty; what training does not change is kept.
    """
    m, r = config.model, config.router
    same = origin.get("model_type") == family.model_type
    kept = dict(origin) if same else {key: origin[key] for key in CARRIED if key in origin}
    defaults = {"max_position_embeddings": config.data.sequence_length, "bos_token_id": None, "pad_token_id": None,
                "eos_token_id": tokenizer.eos_id, "attention_dropout": 0.0, "use_cache": True, "output_router_logits": False}
    found = {**defaults, **kept, "architectures": [family.architecture], "model_type": family.model_type,
             "vocab_size": vocab, "hidden_size": m.width, "num_hidden_layers": m.layers, "num_attention_heads": m.heads,
             "num_key_value_heads": m.kv_heads, "hidden_act": "silu", "rms_norm_eps": m.norm_eps,
             "initializer_range": m.init_std, "tie_word_embeddings": m.tie_embeddings, "num_experts_per_tok": m.top_k,
             family.expert_width: hidden, "router_aux_loss_coef": r.balance_loss / m.top_k}
    for key in family.expert_counts:  # all names that versions of transformers have for it
        found[key] = m.experts
    if family.expert_width != "intermediate_size":
        found["intermediate_size"] = m.ffn_hidden
    if not family.normalizes:
        found["norm_topk_prob"] = r.normalize
    if family.any_block:
        found |= {"decoder_sparse_step": m.moe_every, "mlp_only_layers": list(m.dense_blocks)}
    if family.model_type == "olmoe":
        found["clip_qkv"] = m.clip_qkv
    elif m.head_width is not None or origin.get("head_dim") is not None:
        found["head_dim"] = m.head
    if "rope_parameters" in found:
        found["rope_parameters"] = {**found["rope_parameters"], "rope_theta": m.rope_base}
    if "rope_theta" in found or "rope_parameters" not in found:
        found["rope_theta"] = m.rope_base
    found["torch_dtype" if "torch_dtype" in found or "dtype" not in found else "dtype"] = dtype
    return found


def generation_json(found: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json for a config.json; that of the imported model where there was one."""
    ids = {key: found[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if found.get(key) is not None}
    return dict(origin) if origin else {"_from_model_config": True, **ids}


def tokenizer_json(tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer that has none."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end, "model_max_length": longest,
            "clean_up_tokenization_spaces": False}
