"""Every key of a configuration, with its type, default and meaning.

The text beside a key is the only place where it is explained: `moedist train --help` and the comments of the resolved
YAML in the run folder are both made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional


def key(default: Any, text: str) -> Any:
    """A dataclass field with a default and an explanation; lists and dicts are copied for each instance."""
    metadata = {"help": text}
    if isinstance(default, (list, dict)) or callable(default):
        factory = default if callable(default) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class WorldConfig:
    device: str = key("auto", "auto (the accelerator if there is one), cpu, or a torch device name; a comma-separated "
                              "list gives one per rank (cuda,cpu: rank 0 on a GPU, rank 1 on the CPU)")
    timeout_s: float = key(300.0, "seconds a collective waits for a silent rank before the run ends with an error")
    transport: str = key("auto", "what carries rows between ranks: torchdist (torch.distributed: the vendor's library "
                                 "where all ranks share one, else gloo), mpi (by host memory; needs mpirun or srun "
                                 "--mpi=...), islands (the native library inside an island, host memory between), or "
                                 "auto (islands where there are several; else mpi where mpirun started ranks with a core "
                                 "each, without a common vendor's library; else torchdist)")
    interface: Optional[str] = key(None, "network interface that gloo, NCCL and RCCL use, such as ib0; the variable "
                                         "MOEDIST_IFNAME, where a host has it, comes first (null: theirs to choose)")
    rendezvous_timeout_s: float = key(120.0, "seconds that the ranks have to find each other at the start")
    islands: Optional[list[Any]] = key(None, "island of every rank, such as [0, 0, 1, 1] or [nvidia, nvidia, amd, amd]: ranks "
                                             "that share a collective library (null: one island a vendor)")
    link_test: Any = key("auto", "test the links between ranks before a training, which takes a fraction of a second: true, "
                                 "false or auto (where there are several islands, or MPI carries rows)")
    slowdown: Optional[dict[int, list[float]]] = key(None, "step -> how many times slower each rank computes from then on, "
                                                           "such as {0: [4, 8, 16, 32]}: a laptop plays an uneven cluster "
                                                           "(null: not at all)")


@dataclass(frozen=True)
class DataConfig:
    source: str = key("embedded", "embedded (Python's own sources and documentation, offline), files, or hub")
    path: Optional[str] = key(None, "files: a file or folder of .txt/.jsonl/.parquet (train/valid/test found by name); "
                                    "hub: a dataset name such as Salesforce/wikitext")
    name: Optional[str] = key(None, "hub: the dataset's configuration, such as wikitext-2-v1")
    text_field: str = key("text", "column that holds the text in JSONL, Parquet and hub datasets")
    streaming: bool = key(False, "hub: read documents as they arrive instead of downloading the whole dataset first")
    max_documents: Optional[int] = key(None, "stop reading a split after this many documents (null: read all)")
    valid_fraction: float = key(0.05, "part of the documents held out for validation where the source has no such split")
    tokenizer: str = key("bpe", "byte, bpe (trained on the training text), or the path of a tokenizer.json")
    vocab: int = key(4096, "vocabulary size of a bpe tokenizer trained here")
    sequence_length: int = key(256, "tokens a sequence")
    cache: Optional[str] = key(None, "folder for tokenised text (null: $MOEDIST_CACHE or ~/.cache/moedist)")


@dataclass(frozen=True)
class ModelConfig:
    layers: int = key(4, "transformer blocks")
    width: int = key(256, "model width D")
    heads: int = key(4, "attention heads")
    kv_heads: int = key(2, "key/value heads (grouped-query attention; equal to heads for plain attention)")
    head_width: Optional[int] = key(None, "width of one attention head (null: width / heads)")
    qk_norm: str = key("none", "RMSNorm of queries and keys before they are turned: none, head (over each head, as Qwen3) or "
                               "all (over all heads at once, as OLMoE)")
    clip_qkv: Optional[float] = key(None, "largest absolute value of queries, keys and values (null: no limit)")
    vocab: Optional[int] = key(None, "rows of the token embedding, where some stand for no token (null: as many as the "
                                     "tokenizer has tokens)")
    ffn_hidden: int = key(1024, "hidden width of the dense feed-forward blocks")
    moe_every: int = key(1, "every n-th block has experts instead of a dense feed-forward (0: a dense model)")
    dense_blocks: list[int] = key([], "blocks that have a dense feed-forward although moe_every would give them experts")
    experts: int = key(8, "experts of a layer, E")
    top_k: int = key(2, "experts a token is sent to, K")
    expert_hidden: int = key(512, "hidden width of one expert, F")
    pool_layers: int = key(1, "adjacent blocks with experts that share one pool of them, each with a router of its own (ReXMoE); "
                              "model.experts is then of the pool")
    shared_experts: int = key(0, "experts that see every token, kept beside the routed ones on every rank")
    activation: str = key("swiglu", "swiglu or gelu")
    tie_embeddings: bool = key(True, "use the token embedding as the output projection")
    rope_base: float = key(10000.0, "base of the rotary position frequencies")
    norm_eps: float = key(1e-6, "epsilon of RMSNorm")
    dropout: float = key(0.0, "dropout after attention and feed-forward, while training")
    init_std: float = key(0.02, "standard deviation of the initial weights")
    recompute: bool = key(False, "recompute block activations in the backward pass: less memory, about a third more time")

    @property
    def head(self) -> int:
        """C, width of one attention head."""
        return self.head_width if self.head_width is not None else self.width // self.heads

    def vocab_rows(self, tokens: int) -> int:
        """V, rows of the token embedding for a tokenizer of so many tokens."""
        return tokens if self.vocab is None else self.vocab


@dataclass(frozen=True)
class RouterConfig:
    name: str = key("topk", "random, topk, switch, stochastic_topk, expert_choice, soft_moe, hash, shared_expert, top_p, "
                            "null_experts, deepseek_moe, loss_free, grouped, group_limited, sinkhorn, comet, dynmole, "
                            "progressive, sigma_moe, moe_plus_plus, recurrent, chain, thor or rexmoe")
    balance_loss: float = key(0.01, "weight of the load-balancing loss (loads counted over all ranks)")
    z_loss: float = key(0.001, "weight of the router z-loss")
    bias_rate: float = key(0.0, "step of the auxiliary-loss-free balancing bias (0: off; 0.001 is usual; topk, "
                                "shared_expert, deepseek_moe, grouped and progressive)")
    bias_rule: str = key("sign", "how far the bias of an expert moves in a step: sign (bias_rate, whatever is missing) or "
                                 "proportional (bias_rate times what is missing of its rows, at most bias_rate: it settles "
                                 "nearer, and bears a larger rate)")
    bias_in: str = key("choice", "where the bias counts: choice (added to the scores that choose experts, not to weights) or "
                                 "logits (added to the logits, so in weights too; steps of 0.05)")
    balance_to: str = key("equal", "what the bias or the balance loss aims at: equal (loads of all experts) or speed (loads "
                                   "of ranks in proportion to their speed, which is measured or placement.speeds)")
    capacity_factor: Optional[float] = key(None, "rows an expert takes of one sequence, over the even share; "
                                                 "expert_choice, soft_moe: rows it always takes; all others: rows above "
                                                 "it are dropped (0: none is) "
                                                 "(null: switch 1.25, the others 0 and 1)")
    normalize: bool = key(True, "scale the K weights of a token to sum to one")
    options: dict[str, Any] = key(dict, "values of the router's own, such as {threshold: 0.4} (those of every router are "
                                        "listed at the end)")


@dataclass(frozen=True)
class PlacementConfig:
    owners: Optional[dict[int, list[int]]] = key(None, "rank -> expert ids it owns, in every MoE layer (null: by counts)")
    counts: Optional[list[int]] = key(None, "experts per rank, such as [5, 3] (null: as equal as possible)")
    batch_shares: Optional[list[int]] = key(None, "relative batch per rank, such as [2, 1] (null: equal)")
    planner: str = key("measured", "where neither owners, counts nor batch_shares are given: measured (ranks are measured, "
                                   "then get the experts and the batch they can do) or equal")
    speeds: Optional[list[float]] = key(None, "expert rows per second of every rank, relative; taken instead of measuring")
    dense_speeds: Optional[list[float]] = key(None, "tokens per second of every rank outside the experts, relative (null: "
                                                    "as speeds, or measured)")
    probe_s: float = key(3.0, "seconds that measuring may take at the start of a run")
    max_experts: Optional[list[int]] = key(None, "most experts of a layer per rank, copies included (null: by free memory)")
    max_batch: Optional[list[int]] = key(None, "most sequences per rank in one forward pass (null: by free memory)")
    max_copies: int = key(0, "most copies of experts in a layer; each must save more time than it costs")
    hot_copies: int = key(0, "so many of the hottest experts of a layer have a copy in every island")
    experts_in_every_island: Any = key("auto", "true: every island (see world.islands) has all experts and keeps its tokens, so "
                                               "that islands meet once a step, for gradients and weights, instead of in every "
                                               "layer; the balance loss then looks at the tokens of an island; false; or auto: "
                                               "where so many rows would cross that this is less, and there is room")
    replan_every: int = key(100, "steps between re-plans from measured loads and speeds (0: never)")
    tolerance: float = key(0.03, "a re-plan that saves less than this part of the predicted time is not carried out")


@dataclass(frozen=True)
class DispatchConfig:
    dedup: str = key("auto", "how often a token's row is sent: none (to each of its experts), rank (once to a rank, however "
                             "many of its experts are there), island (once to an island, and on from there) or auto (island "
                             "where there are several and top_k is above 1, else none)")
    cross_dtype: Optional[str] = key(None, "how rows travel between islands in the forward pass: bfloat16, int8 (absmax scale "
                                           "a row) or null (as they are)")
    cross_dtype_backward: Optional[str] = key(None, "the same for their gradients")
    overlap: Any = key("auto", "compute a rank's own rows while others travel: true, false or auto (true where there are "
                               "several islands)")
    overlap_chunks: int = key(1, "pieces that a rank's tokens are cut into; the rows of one travel while those of another are "
                                 "computed, in as many more exchanges")


@dataclass(frozen=True)
class TrainConfig:
    batch: int = key(16, "sequences of one optimizer step, over all ranks")
    accumulate: int = key(1, "parts the batch is cut into, one forward and backward each")
    dtype: str = key("float32", "float32, bfloat16 or float16 (autocast, float32 weights), or float64")
    optimizer: str = key("adamw", "adamw, or sgd (no momentum, for comparisons)")
    lr: float = key(1e-3, "peak learning rate")
    expert_lr_ratio: float = key(1.0, "learning rate of the experts over that of the rest")
    schedule: str = key("cosine", "cosine, linear or constant")
    warmup_steps: int = key(20, "steps of linear warm-up")
    min_lr_ratio: float = key(0.1, "last learning rate over the peak")
    weight_decay: float = key(0.1, "decoupled weight decay (matrices only)")
    beta1: float = key(0.9, "AdamW beta 1")
    beta2: float = key(0.95, "AdamW beta 2")
    eps: float = key(1e-8, "AdamW epsilon")
    clip: float = key(1.0, "largest global gradient norm, dense and experts together (0: no clipping)")
    eval_every: int = key(100, "steps between evaluations on the validation split (0: only at the end)")
    eval_tokens: Optional[int] = key(None, "validation tokens of one evaluation (null: the whole split)")


@dataclass(frozen=True)
class EngineConfig:
    name: str = key("torch", "who holds the dense parameters: torch (replicated, gradients all-reduced) or deepspeed (ZeRO)")
    zero_stage: Optional[int] = key(None, "deepspeed: what of the dense parameters is split over ranks: 0 (nothing), 1 "
                                          "(optimizer state), 2 (gradients too), 3 (weights too) (null: 1)")
    offload: str = key("none", "deepspeed, on an accelerator: none, or cpu (optimizer state and step in host memory)")
    config: Optional[str] = key(None, "deepspeed: a DeepSpeed JSON file with more settings, such as bucket sizes (what moedist "
                                      "decides itself is refused there)")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(100, "steps between checkpoints (0: only at the end and on SIGTERM, SIGINT, SIGUSR1)")
    keep: int = key(2, "newest checkpoints to keep")
    keep_best: int = key(0, "checkpoints of lowest validation loss to keep besides")
    asynchronous: bool = key(True, "write checkpoints while training goes on, from a copy in host memory (false: wait)")


@dataclass(frozen=True)
class MonitorConfig:
    log_every: int = key(10, "steps between log lines")
    output: str = key("auto", "what is printed: auto (a progress bar on a terminal, and lines), plain (lines), quiet (warnings, "
                              "alerts and how it ended), or json (one object a line)")
    layer_keys: int = key(64, "most metrics of single layers; with more layers, so many of them, evenly spread")
    wandb: str = key("auto", "auto (online with a key, else offline), online, offline or disabled")
    project: str = key("moedist", "Weights & Biases project")
    group: Optional[str] = key(None, "Weights & Biases group (null: that of the sweep, else the run's name)")
    wandb_ranks: bool = key(False, "one more Weights & Biases run for every rank but the first, grouped by the run folder")
    artifacts: bool = key(False, "send checkpoints to Weights & Biases as artifacts")
    profile: Optional[str] = key(None, "steps to trace, such as 10-15: a torch profiler trace a rank and a table of all")
    on_non_finite: str = key("stop", "when the loss or a gradient is not finite: stop, or skip (the step is left out)")
    max_skips: int = key(10, "skipped steps in a row after which the run stops all the same")
    loss_spike: float = key(0.5, "alert when the loss of a step is so many nats above its running median (0: never)")
    dead_after: int = key(200, "steps without a row after which an expert is called dead")
    slow_rank: float = key(2.0, "alert when the experts of a rank take so many times what the plan predicts")
    disk_gib: float = key(1.0, "alert when the run folder's disk has fewer GiB free, or room for fewer than two checkpoints")


@dataclass(frozen=True)
class CompressConfig:
    """Values of a `compress` entry of the schedule."""

    method: str = key("cur", "cur, cur-hybrid, interp, cur-matrix, svd, svd-whitened, svd-fisher, prune-random or "
                             "prune-magnitude")
    ratio: Optional[float] = key(None, "share of the experts' bytes to remove")
    bytes: Optional[int] = key(None, "bytes that all experts may take, instead of a ratio")
    rank_bytes: Optional[dict[int, int]] = key(None, "rank -> bytes that the experts on it may take")
    budget: str = key("global", "global (one ranking over all experts and layers), uniform, or frequency (by routed tokens)")
    floor: float = key(0.02, "share of every expert that is kept in any case")
    tokens: int = key(65536, "training tokens that the experts are watched on, forward and backward")
    calibration_bytes: int = key(2**32, "memory of a rank for what is summed meanwhile; where all layers together take "
                                        "more, they are gone through a few at a time")
    distill_steps: int = key(0, "steps in which each smaller expert learns to do what the larger one did, layer by layer")
    distill_lr: float = key(3e-4, "learning rate of these steps")
    options: dict[str, Any] = key(dict, "fields of the method, such as {least_squares: false} (see moedist.compress)")


@dataclass(frozen=True)
class LowBitConfig:
    top_n: Optional[Any] = key(None, "at how many of a token's experts, those its router gives the largest weights, the "
                                     "compensators of low-bit experts are used: a number, or a list of one for each layer "
                                     "with experts (null: at all)")


@dataclass(frozen=True)
class OffloadConfig:
    store: str = key("none", "where experts are in evaluation and generation: none (on the device), ram (host memory), or disk "
                             "(a file that is mapped); those that have rows are fetched")
    cache_gib: float = key(1.0, "GiB of the device that fetched experts may take, on every rank; never exceeded")
    policy: str = key("lru", "which expert makes room: lru (least recently used), or score (least router weight of late)")
    prefetch: int = key(0, "how many experts of the next layer are read ahead: those that its router would choose now")
    read_gib_s: Optional[float] = key(None, "read no faster than this many GiB/s, as from a slower disk or link (null: as "
                                            "fast as can be)")


@dataclass(frozen=True)
class Config:
    name: str = key("run", "name of the run; its folder is <folder>/<name>-<time>")
    folder: str = key("runs", "folder that run folders are made in")
    seed: int = key(0, "seed of weights, data order and routing noise")
    resume: str = key("never", "never, or auto: go on with the newest run of this name that has a checkpoint, where there is "
                               "one (for jobs that are requeued)")
    data: DataConfig = key(DataConfig, "what is read")
    model: ModelConfig = key(ModelConfig, "what is trained")
    router: RouterConfig = key(RouterConfig, "how tokens choose experts")
    placement: PlacementConfig = key(PlacementConfig, "which rank owns which experts and how much of the batch")
    dispatch: DispatchConfig = key(DispatchConfig, "how rows travel to experts and back")
    train: TrainConfig = key(TrainConfig, "how it is trained")
    engine: EngineConfig = key(EngineConfig, "who holds the dense parameters")
    lowbit: LowBitConfig = key(LowBitConfig, "how experts in few bits are used (moedist compress RUN --method beam)")
    offload: OffloadConfig = key(OffloadConfig, "experts outside the device, in evaluation and generation")
    phases: list[Any] = key(lambda: [{"train": 300}], "the schedule, one entry a phase: {train: steps}, or {compress: "
                                                      "{method: cur, ratio: 0.5}} (keys of moedist.config.CompressConfig)")
    world: WorldConfig = key(WorldConfig, "devices and process groups")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "when state is saved")
    monitor: MonitorConfig = key(MonitorConfig, "what is logged where")

    @property
    def train_steps(self) -> int:
        """Optimizer steps over all train phases."""
        return sum(int(phase["train"]) for phase in self.phases if "train" in phase)

    def restored(self, layer: int) -> Optional[int]:
        """`lowbit.top_n` of a block that has experts."""
        n = self.lowbit.top_n
        return n[self.moe_layers().index(layer)] if isinstance(n, list) else n

    def routed_layers(self) -> list[int]:
        """Indices of the blocks that have a router: every n-th block, the last of each n, less `dense_blocks`."""
        n, dense = self.model.moe_every, self.model.dense_blocks
        return [i for i in range(self.model.layers) if n and (i + 1) % n == 0 and i not in dense]

    def moe_layers(self) -> list[int]:
        """Indices of the blocks that have experts of their own: of blocks that share a pool, the first."""
        return self.routed_layers()[::self.model.pool_layers]
