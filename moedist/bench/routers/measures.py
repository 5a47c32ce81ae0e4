"""Every figure of the bench, defined once: what stands at the head of its column, how it is written, and what it is.

The words below the table are made from this; the functions that measure have the formulas and sources.
"""

from __future__ import annotations

import statistics
from typing import Mapping, NamedTuple, Sequence

from moedist.bench.routers.text import TEMPERATURE, TOP_K
from moedist.bench.routers.training import LAST_SHARE, NOISE
from moedist.bench.routers.uneven import SPEEDS


class Measure(NamedTuple):
    """Column head (empty: not in the table, but in CSV and JSON), format, and definition."""

    head: str
    form: str
    text: str


_RANKS = ":".join(f"{s:g}" for s in SPEEDS)
MEASURES: dict[str, Measure] = {
    "balance": Measure("load balance", ".3f", "mean over largest rows of an expert of a layer (1: all have as many), of "
                       f"the last {LAST_SHARE:.0%} of training, whose steps wait for the largest; mean over layers; the "
                       "reciprocal of the metric moe/load_imbalance"),
    "balance_held_out": Measure("of held-out text", ".3f", "the same of text that was not trained on"),
    "utilisation": Measure("utilisation", ".3f", "effective number of experts over their number: exp(entropy of their shares "
                           "of rows) / E, of held-out text, mean over layers"),
    "generate_tps": Measure("generation tokens/s", ",.0f", "new tokens a second, of one process with one thread on a CPU, all "
                            "prompts in one batch, with a key-value cache for routers that a cache does not change (causal, "
                            "without a capacity); all routers in turn, median of rounds"),
    "train_tps": Measure("training tokens/s", ",.0f", "the same of training steps"),
    "diversity": Measure("diversity", ".3f", f"mean of distinct-1, -2 and -3 of text generated at temperature {TEMPERATURE}, "
                         f"top-k {TOP_K}, the same prompts for all: different n-grams of words over all n-grams"),
    "self_bleu": Measure("self-BLEU", ".3f", "mean BLEU-4 of a generated text with all others as references, by nltk: less is "
                         "more varied"),
    "stability": Measure("stability", ".3f", f"of held-out tokens' experts, after {1 - LAST_SHARE:.0%} of training against "
                         "its end: 2 |A and B| / (|A| + |B|) of the (token, expert) pairs, mean over layers; what is drawn "
                         "at random is drawn anew; of Soft MoE the K experts that a token reads most from"),
    "stability_noise": Measure("with noise", ".3f", f"the same with and without Gaussian noise of {NOISE:.0%} of its norm on "
                               "every router's input"),
    "ppl": Measure("perplexity", ".2f", "of a token, of held-out text"),
    "flops_per_token": Measure("MFLOPs/token", ".2f", "matrix products of the forward pass: experts by the rows they got, "
                               "with router, attention, shared experts and output"),
    "rows_per_token": Measure("experts/token", ".2f", "rows of routed experts over tokens, of held-out text, mean over "
                              "layers"),
    "makespan_over_bound": Measure(f"makespan on {_RANKS}", ".3f", f"on ranks of speeds {_RANKS}, experts placed by the "
                                   f"planner by the loads of the last {LAST_SHARE:.0%} of training, rows of held-out text: "
                                   "time of the slowest rank over that of all rows at all speeds, sums over layers"),
    "makespan_over_bound_equal": Measure("equal counts", ".3f", "the same with as many experts on every rank"),
    "distinct_1": Measure("", ".3f", "different words over all"),
    "distinct_2": Measure("", ".3f", "different pairs of words over all"),
    "distinct_3": Measure("", ".3f", "different triples of words over all"),
    "dropped": Measure("", ".4f", "rows that capacity dropped over all that were wanted, of held-out text"),
    "expert_flops_per_token": Measure("", ".2f", "of MFLOPs/token, those of routed experts"),
    **{f"{figure}_{quartile}": Measure("", ",.0f", f"{word} quartile of {figure} over rounds") for figure in
       ("generate_tps", "train_tps") for quartile, word in (("q1", "lower"), ("q3", "upper"))},
}
SCALES = {"flops_per_token": 1e-6, "expert_flops_per_token": 1e-6}  # of what is shown over what is measured
COMPARABLE = ("balance", "utilisation", "generate_tps", "diversity", "stability")  # with the poster's columns


class Spread(NamedTuple):
    """A figure over seeds: mean, sample standard deviation (0 of one) and number."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """
        >>> Spread.of([1.0, 3.0]).mean
        2.0
        """
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def spreads(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Every figure that all seeds have."""
    return {name: Spread.of([figures[name] for figures in of_seeds]) for name in of_seeds[0]
            if all(name in figures for figures in of_seeds)}


def written(name: str, spread: Spread) -> str:
    """A figure as the table shows it: `0.931` or, of several seeds, `0.931 ± 0.004`."""
    scale, form = SCALES.get(name, 1.0), MEASURES[name].form
    text = format(scale * spread.mean, form)
    return f"{text} ± {format(scale * spread.std, form)}" if spread.count > 1 else text
