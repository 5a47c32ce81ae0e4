"""Continuing sequences of token ids with a model: in process, batched, on any number of ranks.

`sampling` chooses the next token from logits, `passes` computes logits with a key-value cache or without, `loop` spreads
sequences over ranks and goes on until all have ended.
"""

from moedist.decoding.loop import Generated, Timings, generate_batch
from moedist.decoding.passes import cacheable
from moedist.decoding.sampling import Sampling, next_tokens

__all__ = ["Generated", "Sampling", "Timings", "cacheable", "generate_batch", "next_tokens"]
