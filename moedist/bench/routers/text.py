"""Text that a model generates, and how varied it is."""

from __future__ import annotations

from typing import Sequence

import torch

from moedist.data import EvalStream
from moedist.decoding import Sampling, generate_batch
from moedist.model import Transformer
from moedist.world import World

TEMPERATURE, TOP_K = 0.8, 50  # as `moedist generate` by default


def continuations(model: Transformer, world: World, prompts: Sequence[Sequence[int]], tokens: int, context: int,
                  dtype: torch.dtype) -> list[list[int]]:
    """What comes after each prompt, all in one batch: `tokens` new ids, whatever they are, so that every router makes as many.

    With a key-value cache where that changes nothing (`moedist.decoding.cacheable`).
    """
    found = generate_batch(model, world, prompts, Sampling(tokens, TEMPERATURE, TOP_K), context=context, dtype=dtype,
                           batch=len(prompts))
    return [samples[0] for samples in found.ids]


def held_out_prompts(stream: EvalStream, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of `count` held-out sequences, evenly spread."""
    return [stream.batch(i * stream.sequences // count, 1)[0][0, :tokens].tolist() for i in range(count)]


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, and runs of other signs, by nltk's `wordpunct_tokenize`."""
    from nltk.tokenize import wordpunct_tokenize
    return wordpunct_tokenize(text)


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of the texts together; 0 where there are none.

    Li et al. 2016 (arXiv 1510.03055, section 5.1). Longer text repeats more: compare only at equal lengths.
    """
    from nltk.util import ngrams
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """Mean over texts of the BLEU-4 of a text with all others as references: 1 where all are alike.

    Zhu et al. 2018 (arXiv 1802.01886, section 2.2), by nltk with Chen and Cherry's smoothing 1, as theirs. Empty texts are
    left out; nan where fewer than two are left.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    full = [list(text) for text in texts if text]
    if len(full) < 2:
        return float("nan")
    smoothing = SmoothingFunction().method1
    scores = [sentence_bleu(full[:i] + full[i + 1:], text, smoothing_function=smoothing) for i, text in enumerate(full)]
    return float(sum(scores) / len(scores))
