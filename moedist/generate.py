"""`moedist generate`: continue prompts with a trained run, on any number of ranks."""

from __future__ import annotations

import sys
from typing import Sequence

import torch

from moedist.checkpoint import RunFolder
from moedist.config import check_config, for_ranks
from moedist.model import Batch, Transformer
from moedist.phases.evaluation import EVAL_SEED
from moedist.phases.restore import open_run, take_outside
from moedist.phases.run import DTYPES
from moedist.routing import mix_seeds
from moedist.world import World, find_launch


def generate(run_folder: str, prompts: Sequence[str], max_tokens: int = 100, temperature: float = 0.8, top_k: int = 50,
             seed: int = 0, overrides: Sequence[str] = ()) -> list[str]:
    """The prompts with their continuations, on every rank.

    Prompts are spread over the ranks, and each draws from a seed of its own, so the text does not depend on how many
    ranks there are.

    Args:
        temperature: 0 takes the likeliest token; top_k: draw among the k likeliest (0: all).
    """
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), find_launch().size)
    check_config(config, find_launch().size)
    with World.start(config.world) as world:
        opened = open_run(folder, config, world)
        tokenizer, model, outside = opened.tokenizer, opened.model, take_outside(opened)
        texts = {}
        for first in range(0, len(prompts), world.size):  # one prompt a rank at a time; ranks without one take part empty
            index = first + world.rank
            mine = tokenizer.encode(prompts[index]) or [tokenizer.eos_id] if index < len(prompts) else None
            ids = continue_tokens(model, world, mine, max_tokens, temperature, top_k, mix_seeds(seed, index),
                                  config.data.sequence_length, tokenizer.eos_id, DTYPES[config.train.dtype])
            if mine:
                texts[index] = tokenizer.decode(ids)
        if outside is not None:
            outside.close()
            if world.is_main:
                print(f"rank 0: {outside.describe()}", file=sys.stderr, flush=True)
        gathered = {i: text for part in world.gather_objects(texts) for i, text in part.items()}
        return [gathered[i] for i in range(len(prompts))]


@torch.no_grad()
def continue_tokens(model: Transformer, world: World, ids: list[int] | None, max_tokens: int, temperature: float,
                    top_k: int, seed: int, context: int, eos: int, dtype: torch.dtype) -> list[int]:
    """`ids` and up to `max_tokens` more, until end of text; None where this rank has no prompt.

    All ranks make `max_tokens` forward passes, since experts of other ranks are needed in each. The last `context` tokens
    are seen.
    """
    ids, idle = list(ids or []), ids is None
    generator = torch.Generator().manual_seed(seed)
    ended = idle
    for _ in range(max_tokens):
        seen = torch.zeros(0, 1, dtype=torch.int64) if ended else torch.tensor([ids[-context:]])
        keys = torch.arange(seen.shape[1]).expand_as(seen)
        device = world.device
        with torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            hidden, _ = model(Batch(seen.to(device), keys.to(device), EVAL_SEED))
        if ended:
            continue
        logits = (hidden[0, -1] @ model.head_weight.to(hidden.dtype).t()).float().cpu()
        ids.append(draw(logits, temperature, top_k, generator))
        ended = ids[-1] == eos
    return ids


def draw(logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token: the likeliest at temperature 0, else drawn among the `top_k` likeliest (0: all)."""
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
