"""The decoding loop: sequences are spread over ranks, come in as others end, and all ranks pass as often as each other."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Callable, NamedTuple, Sequence

import torch

from moedist.decoding.passes import CachedPasses, Sample, WholePasses, cacheable
from moedist.decoding.sampling import Sampling, next_tokens
from moedist.errors import ConfigError
from moedist.model import Transformer
from moedist.routing import mix_seeds
from moedist.world import World


@dataclass(frozen=True)
class Timings:
    """Of a generation, over all ranks.

    Attributes:
        prefill_tokens: prompt tokens that were computed; prefill_s: seconds until they were, and each sequence's first new
            token was drawn.
        decode_tokens: tokens drawn after those; decode_s: seconds of that.
        passes: forward passes of each rank.
        cached: whether keys and values were kept.
    """

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    passes: int
    cached: bool

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens a second, all ranks together."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """New tokens a second, all ranks together."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    def describe(self) -> str:
        """One line for people."""
        return (f"prefill {self.prefill_tokens} tokens in {self.prefill_s:.2f} s, {self.prefill_tps:,.0f} tokens/s; "
                f"decode {self.decode_tokens} tokens in {self.decode_s:.2f} s, {self.decode_tps:,.0f} tokens/s; "
                f"{self.passes} passes {'with' if self.cached else 'without'} a cache")


class Generated(NamedTuple):
    """What came after each prompt: `ids[p][n]`, new token ids of sample n of prompt p, the end of text included where it
    came; and how fast."""

    ids: list[list[list[int]]]
    timings: Timings


@torch.no_grad()
def generate_batch(model: Transformer, world: World, prompts: Sequence[Sequence[int]], sampling: Sampling = Sampling(), *,
                   context: int, eos: int | None = None, dtype: torch.dtype = torch.float32, batch: int = 16,
                   cache: bool | None = None, ended: Callable[[Sequence[int]], bool] | None = None,
                   on_token: Callable[[int, int], None] | None = None) -> Generated:
    """Continue prompts with a model whose experts may be on any ranks. Collective: every rank gives the same prompts.

    Sample i of all (prompt * samples + sample) is made on rank i % ranks. What it is depends on its prompt, its number and
    the seed, not on other prompts or ranks, but for the rounding of sums: exact where routers look at no other sequence,
    as all here do, and logits have no ties.

    Args:
        prompts: token ids, at least one each.
        context: most tokens of a sequence that are seen, `data.sequence_length`; see `moedist.decoding.passes`.
        eos: a token that ends a sequence.
        dtype: that is computed in, as `train.dtype`.
        batch: most sequences of a rank at a time; others wait for one to end.
        cache: keep keys and values; None: where it changes nothing (see `cacheable`).
        ended: of the new ids of a sequence, whether it ends with them.
        on_token: called with (index, token id) for each token drawn on this rank.

    Returns:
        The same on every rank.

    Raises:
        ValueError: an empty prompt. ConfigError: a cache where routers look across tokens.
    """
    if not all(prompts):
        raise ValueError(f"prompt {[bool(p) for p in prompts].index(False)} has no tokens; give it one, such as the end of "
                         "text")
    if cache and not cacheable(model):
        raise ConfigError("a router here looks across the tokens of a sequence, and a cache would change what it does; "
                          "go without one")
    cache = cacheable(model) if cache is None else cache
    was_training = model.training
    model.eval()
    loop = _Loop(model, world, (CachedPasses if cache else WholePasses)(model, context, world.device, dtype), sampling, eos,
                 ended, on_token)
    waiting = deque(_sequence(index, prompts[index // sampling.samples], sampling)
                    for index in range(world.rank, len(prompts) * sampling.samples, world.size))
    loop.run(waiting if sampling.max_tokens else deque(), batch)
    model.train(was_training)
    parts = world.gather_objects((loop.done, loop.tokens, loop.seconds))
    done = {index: ids for part, _, _ in parts for index, ids in part.items()}
    ids = [[done.get(p * sampling.samples + n, []) for n in range(sampling.samples)] for p in range(len(prompts))]
    tokens = [sum(part[1][kind] for part in parts) for kind in (0, 1)]
    seconds = [max(part[2][kind] for part in parts) for kind in (0, 1)]
    return Generated(ids, Timings(tokens[0], seconds[0], tokens[1], seconds[1], loop.passes_made, cache))


def _sequence(index: int, prompt: Sequence[int], sampling: Sampling) -> Sample:
    seed = mix_seeds(sampling.seed, index % sampling.samples, *prompt)
    return Sample(index, list(prompt), len(prompt), torch.Generator().manual_seed(seed))


class _Loop:
    """Of one generation, on one rank."""

    def __init__(self, model: Transformer, world: World, passes: CachedPasses | WholePasses, sampling: Sampling,
                 eos: int | None, ended: Callable[[Sequence[int]], bool] | None,
                 on_token: Callable[[int, int], None] | None):
        self.model, self.world, self.passes, self.sampling = model, world, passes, sampling
        self.eos, self.ended, self.on_token = eos, ended, on_token
        self.done: dict[int, list[int]] = {}
        self.tokens, self.seconds, self.passes_made = [0, 0], [0.0, 0.0], 0  # of prefill and decode

    def run(self, waiting: deque[Sample], batch: int) -> None:
        """Until all ranks are done. A round is one for new prompts where any rank has some, else one for a token each."""
        active: list[Sample] = []
        while True:
            start = time.perf_counter()
            fresh = [waiting.popleft() for _ in range(min(len(waiting), batch - len(active)))]
            self.passes.admit(fresh)
            mine = [self.passes.passes(fresh), self.passes.passes(active)]
            most = self.world.all_reduce_(torch.tensor([len(mine[0]), len(mine[1])]), "max").tolist()
            if not any(most):
                return
            kind = 0 if most[0] else 1
            self.tokens[0] += sum(min(len(s.ids), self.passes.context) for s in fresh)
            self.tokens[1] += 0 if kind == 0 else len(active)
            for i in range(most[kind]):
                self._pass(mine[kind][i] if i < len(mine[kind]) else [])
            active = [s for s in (*active, *fresh) if s.index not in self.done]
            self.passes.keep(active)
            self.seconds[kind] += time.perf_counter() - start

    def _pass(self, sequences: Sequence[Sample]) -> None:
        """One forward pass, and a token more for each of these."""
        self.passes_made += 1
        hidden_GD = self.passes.hidden(sequences)
        if not sequences:
            return
        logits_GV = hidden_GD @ self.model.head_weight.to(hidden_GD.dtype).t()
        logits_GV = logits_GV if logits_GV.dtype == torch.float64 else logits_GV.float()
        # a shade below 1, so that no rounding reaches beyond the last token
        random_G = torch.stack([torch.rand((), generator=s.generator, dtype=torch.float64) for s in sequences]) * (1 - 2**-40)
        for sequence, token in zip(sequences, next_tokens(logits_GV, [s.ids for s in sequences], random_G,
                                                          self.sampling).tolist()):
            sequence.ids.append(token)
            if self.on_token is not None:
                self.on_token(sequence.index, token)
            new = sequence.ids[sequence.prompt:]
            if token == self.eos or len(new) >= self.sampling.max_tokens or (self.ended is not None and self.ended(new)):
                self.done[sequence.index] = new
