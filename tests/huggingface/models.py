"""Tiny models of `transformers` with random weights and a tokenizer, and ours opened for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moedist.checkpoint import RunFolder
from moedist.model import Batch
from moedist.phases.restore import open_run
from moedist.world import World

VOCAB, TOKENS = 330, 300  # rows of the embedding, and those that have a token
SIZES = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=48, initializer_range=0.15, bos_token_id=None, eos_token_id=0, pad_token_id=None)
SPARSE = {
    "mixtral": dict(intermediate_size=14, num_local_experts=5, num_experts_per_tok=2, head_dim=8, sliding_window=None,
                    tie_word_embeddings=True),
    "qwen3_moe": dict(intermediate_size=20, moe_intermediate_size=10, num_experts=6, num_experts_per_tok=3, head_dim=10,
                      decoder_sparse_step=1, mlp_only_layers=[1], norm_topk_prob=True, rope_theta=5e4),
    "olmoe": dict(intermediate_size=12, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False, num_key_value_heads=4,
                  clip_qkv=1.5),
}
DENSE = {
    "llama": dict(intermediate_size=24, head_dim=6),
    "mistral": dict(intermediate_size=24, sliding_window=48),
    "qwen3": dict(intermediate_size=24, head_dim=10, tie_word_embeddings=True),
}
CLASSES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe", "llama": "Llama", "mistral": "Mistral",
           "qwen3": "Qwen3"}
OPTIONS = ["data.max_documents=60", "train.batch=4", "train.eval_every=0", "train.eval_tokens=96", "train.warmup_steps=0",
           "monitor.wandb=disabled", "monitor.log_every=1", "phases=[{train: 2}]"]


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, begin: bool = False, shard: str = "5GB",
               original: bool = True, **keys) -> Path:
    """A folder as save_pretrained writes it, with a tokenizer of 300 tokens.

    Args:
        begin: whether the tokenizer puts a token before every text.
        original: whether experts are apart on disk, as in published models.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**SIZES, **SPARSE.get(kind, {}), **DENSE.get(kind, {}), **keys}
    config = getattr(transformers, CLASSES[kind] + "Config")(**sizes)
    model = getattr(transformers, CLASSES[kind] + "ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # norms start as ones, which any mistake passes
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=shard, save_original_format=original)
    save_tokenizer(folder, begin)
    return folder


def save_tokenizer(folder: Path, begin: bool) -> None:
    """tokenizer.json and what transformers keeps beside it."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=["<|the end|>", "<|begin|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(["def read(self, path):\n    return self.open(path)\n"] * 50, trainer)
    if begin:
        library.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast",
                                                              "eos_token": "<|the end|>", "model_max_length": 48}))


def some_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(2, VOCAB, (3, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    # its grouped kernels want widths that are multiples of 16 bytes
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    return model(some_ids()).logits


@torch.no_grad()
def their_texts(folder: Path, prompts: list[list[int]], tokens: int, penalties: tuple[float, ...]) -> list[list[list[int]]]:
    """Up to so many new token ids of each prompt, the likeliest ones, at each repetition penalty."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    return [[model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, repetition_penalty=penalty,
                            eos_token_id=0, pad_token_id=0)[0, len(ids):].tolist() for ids in prompts]
            for penalty in penalties]


@torch.no_grad()
def our_logits(run: RunFolder | Path, world: World | None = None) -> torch.Tensor:
    """Of a run's newest checkpoint, on this rank of a world or alone."""
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    model, ids = open_run(folder, folder.config(), world or World()).model, some_ids()
    hidden, _ = model(Batch(ids, torch.zeros_like(ids), 0))
    return hidden @ model.head_weight.t()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the safetensors of a folder."""
    from safetensors.torch import load_file
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
