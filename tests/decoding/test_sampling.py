"""Choosing the next token: the filters against those of transformers, the draw against the probabilities."""

import pytest
import torch

from moedist.decoding import Sampling, next_tokens
from moedist.decoding.sampling import filtered, penalised
from moedist.errors import ConfigError

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.9, -2.0]], dtype=torch.float64)
ALL = dict(temperature=1.0, top_k=0)


def draws(n, logits=LOGITS, **sampling):
    """Tokens at n evenly spread random numbers, so that counts are probabilities."""
    random = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return next_tokens(logits.expand(n, -1), [[]] * n, random, Sampling(**sampling))


def test_greedy_reads_no_random_number():
    assert next_tokens(LOGITS, [[]], torch.full((1,), torch.nan), Sampling(temperature=0)).tolist() == [1]
    assert next_tokens(LOGITS, [[1]], torch.zeros(1), Sampling(temperature=0, repetition_penalty=2.0)).tolist() == [3]


@pytest.mark.parametrize("sampling, support", [(dict(top_k=2), {1, 3}), (dict(top_k=1), {1}), (dict(top_p=0.5), {1, 3}),
                                               (dict(top_p=0.01), {1}), (dict(min_p=0.9), {1, 3}),
                                               (dict(min_p=1.0), {1}), (dict(top_k=3, top_p=0.999), {1, 2, 3}),
                                               ({}, set(range(5)))])
def test_draws_follow_the_probabilities_of_what_is_left(sampling, support):
    found = draws(4000, **{**ALL, **sampling})
    assert set(found.tolist()) == support
    left = torch.where(torch.tensor([i in support for i in range(5)]), LOGITS[0], -torch.inf).softmax(0)
    counts = torch.bincount(found, minlength=5) / 4000
    torch.testing.assert_close(counts.double(), left, atol=6e-4, rtol=0)


def test_temperature_sharpens():
    cold, warm = (torch.bincount(draws(1000, temperature=t, top_k=0), minlength=5)[1] for t in (0.3, 3.0))
    assert cold > 550 and warm < 400


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
def test_no_random_number_reaches_beyond_the_last_token(kind):
    random = torch.tensor([0.0, 1 - 2**-40], dtype=torch.float64)
    logits = torch.full((2, 3000), -torch.inf, dtype=getattr(torch, kind)).index_fill(1, torch.tensor([7, 2000]), 0.3)
    assert next_tokens(logits, [[], []], random, Sampling(**ALL)).tolist() == [7, 2000]


@pytest.mark.parametrize("sampling", [dict(top_k=7), dict(top_p=0.8), dict(min_p=0.05), dict(top_k=20, top_p=0.9, min_p=0.02),
                                      dict(temperature=1.7, top_p=0.3, repetition_penalty=1.4), dict(repetition_penalty=0.7)])
def test_filters_are_those_of_transformers(sampling):
    processors = pytest.importorskip("transformers.generation.logits_process")
    ours = Sampling(**{**ALL, **sampling})
    logits = 3 * torch.randn(5, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.randint(0, 60, (5, 9), generator=torch.Generator().manual_seed(2))
    theirs = processors.RepetitionPenaltyLogitsProcessor(ours.repetition_penalty)(seen, logits)
    theirs = processors.TemperatureLogitsWarper(ours.temperature)(seen, theirs)
    for value, off, kind in ((ours.top_k, 0, "TopK"), (ours.top_p, 1, "TopP"), (ours.min_p, 0, "MinP")):
        if value != off:
            theirs = getattr(processors, f"{kind}LogitsWarper")(value)(seen, theirs)
    found = filtered(penalised(logits, seen.tolist(), ours.repetition_penalty) / ours.temperature, ours)
    torch.testing.assert_close(found, theirs)
    assert found.isinf().any() or set(sampling) == {"repetition_penalty"}


@pytest.mark.parametrize("wrong", [dict(top_p=0), dict(top_p=1.5), dict(min_p=2), dict(temperature=-1), dict(samples=0),
                                   dict(repetition_penalty=0), dict(max_tokens=-1), dict(top_k=-1)])
def test_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be "):
        Sampling(**wrong)
