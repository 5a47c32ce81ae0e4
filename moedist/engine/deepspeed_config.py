"""The DeepSpeed configuration of a run: what moedist decides, and on top of it the user's own JSON file.

Nothing here imports DeepSpeed, so that a configuration can be refused before any rank starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from moedist.config import Config, EngineConfig
from moedist.errors import ConfigError

LEAST_VERSION = (0, 19)
# What moedist decides, and where a user sets it instead. "auto", as in files for Hugging Face, and "enabled": false say
# nothing and are let through.
_DTYPE = "train.dtype (weights and gradients stay float32, as with engine.name=torch)"
OWNED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.batch, train.accumulate and placement.batch_shares",
    "gradient_accumulation_steps": "train.accumulate",
    "managed_gradient_accumulation": "train.accumulate",
    "gradient_clipping": "train.clip (one norm over dense and expert parameters)",
    "optimizer": "train.optimizer, train.weight_decay, train.beta1, train.beta2 and train.eps",
    "scheduler": "train.lr, train.schedule, train.warmup_steps and train.min_lr_ratio",
    "fp16": _DTYPE, "bf16": _DTYPE, "bfloat16": _DTYPE, "amp": _DTYPE, "torch_autocast": _DTYPE, "data_types": _DTYPE,
    "communication_data_type": "nothing: gradients are summed in float32",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "sequence_parallel_size": "nothing: every rank has sequences of its own",
    "tensor_parallel": "nothing: dense parameters are not split within a matrix",
}


def zero_stage(engine: EngineConfig) -> int:
    """The ZeRO stage; 1 where none is given, since splitting the optimizer state costs no more communication."""
    return 1 if engine.zero_stage is None else engine.zero_stage


def check_deepspeed(config: Config) -> None:
    """Raise `ConfigError` where the run wants DeepSpeed and it is not installed, or its JSON file cannot be used."""
    if config.engine.name != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("engine.name=deepspeed, but DeepSpeed is not installed here; pip install 'moedist[deepspeed]', or "
                          "set engine.name=torch")
    refuse_old(importlib.metadata.version("deepspeed"))
    deepspeed_json(config.engine)


def refuse_old(version: str) -> None:
    """Raise `ConfigError` for a DeepSpeed that is too old: 0.18 accumulates offloaded gradients wrongly, without a word."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if found < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ConfigError(f"engine.name=deepspeed needs DeepSpeed {least} or later, but {version} is installed; pip install -U "
                          "deepspeed, or set engine.name=torch")


def deepspeed_json(engine: EngineConfig) -> dict[str, Any]:
    """What is given to `deepspeed.initialize`.

    Raises:
        ConfigError: the user's file is unreadable or sets what moedist decides.
    """
    stage, user = zero_stage(engine), _read(engine.config) if engine.config else {}
    for name, instead in OWNED.items():
        _refuse(user, name, instead, engine)
    zero = {"reduce_bucket_size": 2**24, "allgather_bucket_size": 2**24, **user.pop("zero_optimization", {}), "stage": stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": engine.offload, "pin_memory": True}
    return {
        "steps_per_print": 2**31,  # moedist logs
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, with the same arithmetic
        **user,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,  # only used by DeepSpeed's own logging
        "gradient_clipping": 0.0,  # its default is 1.0 over the dense parameters alone
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.config: no readable file {path} ({error.strerror}); give a DeepSpeed JSON file, or "
                          "engine.config=null") from error
    except ValueError as error:
        raise ConfigError(f"engine.config: {path} is not JSON: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization", {}), dict):
        raise ConfigError(f"engine.config: {path} must hold an object of DeepSpeed keys, and one for zero_optimization")
    return tree


def _refuse(user: dict[str, Any], name: str, instead: str, engine: EngineConfig) -> None:
    """Take an owned key out of the user's settings, or raise where it says something."""
    *sections, leaf = name.split(".")
    for section in sections:
        user = user.get(section, {})
    if leaf not in user:
        return
    value = user.pop(leaf)
    off = isinstance(value, dict) and (value.get("enabled") in (False, "auto") or value.get("device") == "none")
    agreed = leaf == "stage" and value == zero_stage(engine) or leaf == "offload_optimizer" and isinstance(value, dict) \
        and value.get("device") == engine.offload
    if value in ("auto", None) or off or agreed:
        return
    raise ConfigError(f"engine.config: {engine.config} sets {name} to {json.dumps(value)}, which moedist decides; remove it "
                      f"there, and set {instead}")
