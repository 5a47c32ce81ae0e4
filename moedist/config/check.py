"""Refuse combinations that cannot run, with the numbers, before any process group starts."""

from __future__ import annotations

from moedist.config.load import compress_config
from moedist.config.schema import CompressConfig, Config
from moedist.errors import ConfigError

ROUTERS = ("random", "topk", "switch", "stochastic_topk", "expert_choice", "soft_moe", "hash", "shared_expert", "top_p",
           "null_experts", "deepseek_moe", "loss_free", "grouped", "group_limited", "sinkhorn", "comet", "dynmole",
           "progressive", "sigma_moe", "moe_plus_plus", "recurrent", "chain", "thor", "rexmoe")
WITH_BIAS = ("topk", "rexmoe", "shared_expert", "deepseek_moe", "grouped", "progressive")
WITH_OWN_BIAS = ("loss_free", "group_limited")
METHODS = ("cur", "cur-hybrid", "interp", "cur-matrix", "svd", "svd-whitened", "svd-fisher", "prune-random",
           "prune-magnitude")
BUDGETS = ("global", "uniform", "frequency")
CHOICES = {
    "data.source": ("embedded", "files", "hub"),
    "model.activation": ("swiglu", "gelu"),
    "model.qk_norm": ("none", "head", "all"),
    "router.name": ROUTERS,
    "router.balance_to": ("equal", "speed"),
    "router.bias_rule": ("sign", "proportional"),
    "router.bias_in": ("choice", "logits"),
    "train.dtype": ("float32", "bfloat16", "float16", "float64"),
    "train.schedule": ("cosine", "linear", "constant"),
    "train.optimizer": ("adamw", "sgd"),
    "placement.planner": ("measured", "equal"),
    "placement.experts_in_every_island": ("auto", True, False),
    "world.transport": ("auto", "torchdist", "mpi", "islands"),
    "world.link_test": ("auto", True, False),
    "dispatch.dedup": ("auto", "none", "rank", "island"),
    "dispatch.cross_dtype": (None, "bfloat16", "int8"),
    "dispatch.cross_dtype_backward": (None, "bfloat16", "int8"),
    "dispatch.overlap": ("auto", True, False),
    "engine.name": ("torch", "deepspeed"),
    "engine.offload": ("none", "cpu"),
    "offload.store": ("none", "ram", "disk"),
    "offload.policy": ("lru", "score"),
    "monitor.wandb": ("auto", "online", "offline", "disabled"),
    "monitor.output": ("auto", "plain", "quiet", "json"),
    "monitor.on_non_finite": ("stop", "skip"),
    "resume": ("never", "auto"),
}
POSITIVE = ("data.sequence_length", "data.vocab", "model.layers", "model.width", "model.heads", "model.kv_heads",
            "model.ffn_hidden", "model.experts", "model.top_k", "model.expert_hidden", "model.pool_layers", "train.batch",
            "train.accumulate", "train.lr", "train.expert_lr_ratio", "world.timeout_s", "world.rendezvous_timeout_s",
            "monitor.log_every", "monitor.dead_after", "monitor.slow_rank", "checkpoint.keep", "offload.cache_gib",
            "placement.probe_s", "dispatch.overlap_chunks")
NOT_NEGATIVE = ("model.moe_every", "model.shared_experts", "router.balance_loss", "router.z_loss", "router.bias_rate",
                "train.warmup_steps", "train.min_lr_ratio", "train.weight_decay",
                "train.clip", "train.eval_every", "checkpoint.every", "checkpoint.keep_best", "model.init_std",
                "monitor.layer_keys", "monitor.max_skips", "monitor.loss_spike", "monitor.disk_gib", "offload.prefetch",
                "placement.max_copies", "placement.hot_copies", "placement.replan_every", "placement.tolerance")
FRACTIONS = ("data.valid_fraction", "model.dropout", "train.beta1", "train.beta2")  # [0, 1)


def check_config(config: Config, world_size: int) -> None:
    """Raise `ConfigError` for the first thing that cannot work with this many ranks.

    Placement (`owners`, `counts`, `batch_shares`) is checked where it is turned into a plan,
    `moedist.placement.from_config`.
    """
    _check_values(config)
    _check_model(config)
    _check_phases(config, world_size)
    t = config.train
    if t.batch % t.accumulate:
        raise ConfigError(f"train.batch ({t.batch} sequences) must be a multiple of train.accumulate ({t.accumulate}); "
                          f"set train.batch={t.batch + t.accumulate - t.batch % t.accumulate}")
    _check_lowbit(config)
    _check_engine(config)
    _check_ranks(config, world_size)
    _check_transport(config)
    _check_checkpoint(config)
    profile_steps(config.monitor.profile)


def profile_steps(text: str | None) -> range:
    """The steps that `monitor.profile` asks for, from 1; none where it is null.

    Raises:
        ConfigError: it is not of the form FIRST-LAST.
    """
    if text is None:
        return range(0)
    first, dash, last = str(text).partition("-")
    last = last if dash else first
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"monitor.profile is {text!r}; give steps from 1, such as 10-15 or 12")
    return range(int(first), int(last) + 1)


def _check_lowbit(config: Config) -> None:
    n, layers = config.lowbit.top_n, config.moe_layers()
    given = n if isinstance(n, list) else [n]
    if isinstance(n, list) and len(n) != len(layers):
        raise ConfigError(f"lowbit.top_n lists {len(n)} numbers for {len(layers)} layers with experts; give one, or one each")
    for one in given:
        if one is not None and (type(one) is not int or not 0 <= one <= config.model.experts):
            raise ConfigError(f"lowbit.top_n is {one!r}: how many of a token's experts have their compensators used, 0 to "
                              f"{config.model.experts} (with router topk, {config.model.top_k} are all)")


def _check_transport(config: Config) -> None:
    w, d = config.world, config.dispatch
    if d.overlap is False and d.overlap_chunks > 1:
        raise ConfigError(f"dispatch.overlap_chunks={d.overlap_chunks} lets a piece travel while another is computed, "
                          "but dispatch.overlap is false; set dispatch.overlap=true, or dispatch.overlap_chunks=1")
    if w.transport in ("torchdist", "mpi"):
        for name, value in (("dedup=island", d.dedup == "island"), ("cross_dtype", d.cross_dtype),
                            ("cross_dtype_backward", d.cross_dtype_backward)):
            if value:
                raise ConfigError(f"dispatch.{name} is about rows between islands, but world.transport={w.transport} does not "
                                  "tell them apart; set world.transport=islands")


def _check_checkpoint(config: Config) -> None:
    every, best, evaluated = config.checkpoint.every, config.checkpoint.keep_best, config.train.eval_every
    if best and every and (not evaluated or every % evaluated):
        raise ConfigError(f"checkpoint.keep_best={best} goes by validation loss, but not every checkpoint is evaluated "
                          f"(checkpoint.every is {every}, train.eval_every {evaluated}); set train.eval_every={every} or a "
                          "divisor of it")


def _check_engine(config: Config) -> None:
    e = config.engine
    if e.name == "torch":
        for name, nothing in (("zero_stage", None), ("offload", "none"), ("config", None)):
            if (value := getattr(e, name)) != nothing:
                raise ConfigError(f"engine.{name}={value} is for engine.name=deepspeed, but engine.name is torch; set "
                                  f"engine.name=deepspeed, or engine.{name}={nothing or 'null'}")
        return
    if e.zero_stage not in (None, 0, 1, 2, 3):
        raise ConfigError(f"engine.zero_stage is {e.zero_stage}; choose 0, 1, 2 or 3")
    if e.offload == "cpu" and e.zero_stage == 0:
        raise ConfigError("engine.offload=cpu moves optimizer state that ZeRO has split, but engine.zero_stage is 0; set "
                          "engine.zero_stage=1, 2 or 3")
    if e.offload == "cpu" and config.world.device == "cpu":
        raise ConfigError("engine.offload=cpu brings nothing with world.device=cpu, where all is in host memory; set "
                          "engine.offload=none")
    if config.train.dtype == "float64":
        raise ConfigError("train.dtype=float64 needs engine.name=torch: DeepSpeed keeps float32 weights")


def _check_ranks(config: Config, world_size: int) -> None:
    """Whatever is listed per rank has one entry per rank."""
    devices = config.world.device.split(",")
    if len(devices) > 1 and len(devices) != world_size:
        raise ConfigError(f"world.device lists {len(devices)} devices for {world_size} ranks; give one, or one per rank")
    for name in ("world.islands", "placement.speeds", "placement.dense_speeds", "placement.max_experts",
                 "placement.max_batch"):
        value = _get(config, name)
        if value is not None and len(value) != world_size:
            raise ConfigError(f"{name} has {len(value)} entries for {world_size} ranks; give one per rank")
        if value is not None and name != "world.islands" and min(value) < 0:
            raise ConfigError(f"{name} is {value}; all must be 0 or more")
    unnamed = [island for island in config.world.islands or () if not isinstance(island, (int, str))]
    if unnamed:
        raise ConfigError(f"world.islands has {unnamed[0]!r}; an island is a whole number or a name, such as [nvidia, amd]")
    for name in ("placement.speeds", "placement.dense_speeds"):
        if (value := _get(config, name)) is not None and max(value) <= 0:
            raise ConfigError(f"{name} is {value}; one of them must be above 0")
    for step, factors in (config.world.slowdown or {}).items():
        if step < 0 or len(factors) != world_size or min(factors) < 1:
            raise ConfigError(f"world.slowdown has {factors} from step {step} on; give {world_size} factors, one per rank, of "
                              "1 (not slowed) or more, from step 0 or later")


def _check_values(config: Config) -> None:
    for name, allowed in CHOICES.items():
        if (value := _get(config, name)) not in allowed:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(_as_yaml, allowed))}")
    for name in POSITIVE:
        if (value := _get(config, name)) <= 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    for name in NOT_NEGATIVE:
        if (value := _get(config, name)) < 0:
            raise ConfigError(f"{name} is {value}; it must be 0 or more")
    for name in FRACTIONS:
        if not 0 <= (value := _get(config, name)) < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 0 and below 1")
    if config.data.source != "embedded" and not config.data.path:
        raise ConfigError(f"data.source={config.data.source} needs data.path; "
                          "use data.source=embedded to train on text that every machine has")


def _check_model(config: Config) -> None:
    m, r = config.model, config.router
    if m.head_width is None and (m.width % m.heads or m.head % 2):
        raise ConfigError(f"model.width ({m.width}) over model.heads ({m.heads}) must be an even whole number "
                          "(rotary positions turn pairs)")
    for name in ("head_width", "clip_qkv", "vocab"):
        if (value := getattr(m, name)) is not None and value <= 0:
            raise ConfigError(f"model.{name} is {value}; it must be above 0, or null")
    if m.head % 2:
        raise ConfigError(f"model.head_width ({m.head_width}) must be even (rotary positions turn pairs)")
    if m.heads % m.kv_heads:
        raise ConfigError(f"model.heads ({m.heads}) must be a multiple of model.kv_heads ({m.kv_heads})")
    if m.moe_every > m.layers:
        raise ConfigError(f"model.moe_every ({m.moe_every}) is above model.layers ({m.layers}): no block would have "
                          f"experts; set model.moe_every={m.layers} or less, or 0 for a dense model")
    if m.dense_blocks and (not config.moe_layers() or not 0 <= min(m.dense_blocks) <= max(m.dense_blocks) < m.layers):
        raise ConfigError(f"model.dense_blocks is {m.dense_blocks}: the blocks are 0..{m.layers - 1}, and with "
                          f"model.moe_every={m.moe_every} one of them must keep its experts (for a dense model set "
                          "model.moe_every=0)")
    if (routed := len(config.routed_layers())) % m.pool_layers:
        raise ConfigError(f"model.pool_layers is {m.pool_layers}, but {routed} blocks have experts, which is no multiple of "
                          f"it; choose one of {[n for n in range(1, routed + 1) if routed % n == 0]}")
    if r.name == "rexmoe" and (m.pool_layers < 2 or m.experts % m.pool_layers):
        raise ConfigError(f"router.name=rexmoe chooses among the experts of several layers, but model.pool_layers is "
                          f"{m.pool_layers} and model.experts, of the pool, {m.experts}; set model.pool_layers=2 (or more) "
                          "and model.experts to a multiple of it")
    if m.top_k > m.experts:
        raise ConfigError(f"model.top_k ({m.top_k}) is above model.experts ({m.experts}); a token cannot go to more "
                          f"experts than there are: set model.top_k={m.experts} or less")
    if r.capacity_factor is not None and r.capacity_factor < 0:
        raise ConfigError(f"router.capacity_factor is {r.capacity_factor}; it must be 0 (dropless) or more")
    if r.name in ("expert_choice", "soft_moe") and r.capacity_factor == 0:
        raise ConfigError(f"router.capacity_factor is 0 but a {r.name} expert takes its factor times the even share of "
                          "rows; set router.capacity_factor=1")
    if r.name == "switch" and m.top_k != 1:
        raise ConfigError(f"router.name=switch sends a token to one expert but model.top_k is {m.top_k}; "
                          "set model.top_k=1 or router.name=topk")
    if r.name in ("shared_expert", "deepseek_moe") and m.shared_experts < 1:
        raise ConfigError(f"router.name={r.name} has experts that see every token but model.shared_experts is 0; "
                          "set model.shared_experts=1")
    if r.balance_to == "speed" and not r.balance_loss and not r.bias_rate and r.name not in WITH_OWN_BIAS:
        raise ConfigError("router.balance_to=speed says what to balance to, but router.balance_loss and router.bias_rate are "
                          "both 0, so nothing balances; set router.bias_rate=0.001")
    if r.bias_in == "logits" and not r.bias_rate:
        raise ConfigError("router.bias_in=logits says where a bias counts, but router.bias_rate is 0, so there is none; set "
                          "router.bias_rate=0.05 or router.bias_in=choice")
    if r.bias_rate and r.name not in WITH_BIAS:
        own = " (its own is update_rate in router.options)" if r.name in WITH_OWN_BIAS else ""
        raise ConfigError(f"router.bias_rate={r.bias_rate} works with router.name={', '.join(WITH_BIAS)}, not {r.name}; set "
                          f"router.bias_rate=0{own}")


def _check_phases(config: Config, world_size: int) -> None:
    if not config.phases:
        raise ConfigError("phases is empty; give at least one, such as phases: [{train: 300}]")
    for i, phase in enumerate(config.phases):
        if not isinstance(phase, dict) or len(phase) != 1 or not phase.keys() <= {"train", "compress"}:
            raise ConfigError(f"phases[{i}] is {phase!r}; known phases: {{train: STEPS}} and "
                              "{compress: {method: cur, ratio: 0.5}}, each an entry of its own")
        (name, value), = phase.items()
        if name == "compress":
            _check_compress(config, compress_config(value, f"phases[{i}].compress"), f"phases[{i}].compress", world_size)
        elif not isinstance(value, int) or value < 1:
            raise ConfigError(f"phases[{i}] trains {value!r} steps; give a whole number above 0")


def _check_compress(config: Config, c: CompressConfig, where: str, world_size: int) -> None:
    if not config.moe_layers():
        raise ConfigError(f"{where}: the model has no experts to compress (model.moe_every is 0)")
    for name, allowed in (("method", METHODS), ("budget", BUDGETS)):
        if (value := getattr(c, name)) not in allowed:
            raise ConfigError(f"{where}.{name} is {value!r}; choose one of {', '.join(allowed)}")
    if (c.ratio is None) + (c.bytes is None) == 0 or c.ratio is c.bytes is c.rank_bytes:
        raise ConfigError(f"{where} needs one of ratio and bytes, or rank_bytes; it has ratio={c.ratio}, bytes={c.bytes}, "
                          f"rank_bytes={c.rank_bytes}")
    if c.ratio is not None and not 0 <= c.ratio < 1:
        raise ConfigError(f"{where}.ratio is {c.ratio:g}: the share to remove, at least 0 and below 1")
    if any(not 0 <= r < world_size for r in c.rank_bytes or ()):
        raise ConfigError(f"{where}.rank_bytes names ranks {sorted(c.rank_bytes)}, but the ranks are 0..{world_size - 1}")
    if min(c.tokens, c.calibration_bytes, c.distill_lr) <= 0 or c.distill_steps < 0 or not 0 <= c.floor < 1:
        raise ConfigError(f"{where} has tokens={c.tokens}, calibration_bytes={c.calibration_bytes}, distill_lr="
                          f"{c.distill_lr:g} (each above 0), distill_steps={c.distill_steps} (0 or more), floor={c.floor:g} "
                          "(at least 0 and below 1); one of them is out of its range")


def _as_yaml(value: str | bool | None) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, value)


def _get(config: Config, name: str):
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
