"""Forward passes of decoding: with a key-value cache, or over whole sequences where a router looks across tokens.

Both see at most `context` tokens of a sequence. When one more would not fit, the sequence forgets all but the last half of
the context, and goes on from there: with a cache that is one pass over half a context every half context of new tokens.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Sequence

import torch

from moedist.engine.forward import hidden_states
from moedist.model import Batch, KVCache, Transformer

ROUTING_SEED = 0  # routers that draw experts at random draw the same in every pass, as in evaluations


@dataclass
class Sample:
    """One sample of a prompt while it is continued.

    Attributes:
        index: prompt * samples + sample.
        ids: the prompt and what came after it.
        start: of what is seen.
        cached: tokens from `start` on whose keys and values are kept.
    """

    index: int
    ids: list[int]
    prompt: int
    generator: torch.Generator
    start: int = 0
    cached: int = 0

    def slide(self, context: int) -> bool:
        """Forget all but the last half of the context where one more token does not fit; whether it did."""
        if len(self.ids) - self.start <= context:
            return False
        # a prompt that does not fit is seen as far as it can be
        seen = context if len(self.ids) == self.prompt else max(1, context // 2)
        self.start, self.cached = len(self.ids) - seen, 0
        return True


def cacheable(model: Transformer) -> bool:
    """Whether every token is routed by what came before it alone, so that a cache changes nothing.

    Routers that are not causal look at later tokens. A capacity is counted over a sequence and grows with it, so that a
    row that was dropped in a short sequence is not in a longer one.
    """
    return all(layer.router.causal and not layer.router.config.capacity_factor for _, layer in model.moe_layers())


class CachedPasses:
    """One pass for all sequences, each with the tokens that are new."""

    def __init__(self, model: Transformer, context: int, device: torch.device, dtype: torch.dtype):
        self.model, self.context, self.device, self.dtype = model, context, device, dtype
        self.cache = KVCache(len(model.layers), device)
        self.sequences: list[Sample] = []

    def admit(self, fresh: Sequence[Sample]) -> None:
        self.sequences += fresh

    def keep(self, going_on: Sequence[Sample]) -> None:
        """Drop all others; `going_on` are in the order they came in."""
        places = {id(s): i for i, s in enumerate(self.sequences)}
        if len(going_on) < len(self.sequences):
            self.cache.keep(places[id(s)] for s in going_on)
        self.sequences = list(going_on)

    def passes(self, sequences: Sequence[Sample]) -> list[list[Sample]]:
        """Which sequences go into which pass; they are all, or the newest."""
        return [list(sequences)] if sequences else []

    def hidden(self, sequences: Sequence[Sample]) -> torch.Tensor:
        """[G, D] hidden states of the last tokens. Every rank calls it, with no sequences too."""
        first = len(self.sequences) - len(sequences)
        for i, sequence in enumerate(sequences, first):
            if sequence.slide(self.context) and i < len(self.cache.lengths):
                self.cache.restart(i)
        new = [s.ids[s.start + s.cached:] for s in sequences]
        keys = [k for s in sequences for k in range(s.start + s.cached, len(s.ids))]
        ids_T1 = torch.tensor([i for ids in new for i in ids], dtype=torch.int64).unsqueeze(1)
        keys_T1 = torch.tensor(keys, dtype=torch.int64).unsqueeze(1)
        self.cache.begin(first, [len(ids) for ids in new])
        batch = Batch(ids_T1, keys_T1, ROUTING_SEED).to(self.device)
        hidden, _ = hidden_states(self.model, batch, self.dtype, self.cache)
        for sequence, ids in zip(sequences, new):
            sequence.cached += len(ids)
        last_G = torch.tensor([len(ids) for ids in new], dtype=torch.int64).cumsum(0) - 1
        return hidden[last_G.to(self.device), 0]


class WholePasses:
    """Every token from its whole sequence; sequences of one length together, so that no router sees padding."""

    def __init__(self, model: Transformer, context: int, device: torch.device, dtype: torch.dtype):
        self.model, self.context, self.device, self.dtype = model, context, device, dtype

    def admit(self, fresh: Sequence[Sample]) -> None:
        """Nothing is kept between passes."""

    def keep(self, going_on: Sequence[Sample]) -> None:
        """Nothing is kept between passes."""

    def passes(self, sequences: Sequence[Sample]) -> list[list[Sample]]:
        """Which sequences go into which pass."""
        by_length = defaultdict(list)
        for sequence in sequences:
            sequence.slide(self.context)
            by_length[len(sequence.ids) - sequence.start].append(sequence)
        return [by_length[length] for length in sorted(by_length)]

    def hidden(self, sequences: Sequence[Sample]) -> torch.Tensor:
        """[G, D] hidden states of the last tokens. Every rank calls it, with no sequences too."""
        length = len(sequences[0].ids) - sequences[0].start if sequences else 1
        ids_GS = torch.tensor([s.ids[s.start:] for s in sequences], dtype=torch.int64).view(-1, length)
        starts_G1 = torch.tensor([s.start for s in sequences], dtype=torch.int64).view(-1, 1)
        batch = Batch(ids_GS, starts_G1 + torch.arange(length), ROUTING_SEED).to(self.device)
        return hidden_states(self.model, batch, self.dtype)[0][:, -1]
