"""From logits to the next token: filters as they are usually meant, and a draw that needs one random number.

G sequences, V tokens. The filters and their order are those of Hugging Face's `generate`: repetition penalty, temperature,
top-k, top-p, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch

from moedist.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How sequences are continued.

    Attributes:
        max_tokens: new tokens of a sequence, at most.
        temperature: 0 takes the likeliest token, and none of the following four but the penalty matters then.
        top_k: draw among the k likeliest (0: all).
        top_p: among the fewest likeliest whose probabilities sum to p or more (Holtzman et al. 2020, arXiv 1904.09751).
        min_p: among those with at least so many times the probability of the likeliest (Nguyen et al. 2024, arXiv
            2407.01082).
        repetition_penalty: divides positive logits of tokens that are in the sequence already, prompt included, and
            multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858, section 4.1); 1: none.
        seed: every sample of every prompt draws from a seed of its own, made of this, the prompt and the sample's number.
        samples: of each prompt.
    """

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        for name, ok, bounds in (("max_tokens", self.max_tokens >= 0, "0 or more"),
                                 ("temperature", self.temperature >= 0, "0 or more"),
                                 ("top_k", self.top_k >= 0, "0 (all) or more"),
                                 ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
                                 ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                                 ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
                                 ("samples", self.samples >= 1, "1 or more")):
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {bounds}")


def next_tokens(logits_GV: torch.Tensor, seen: Sequence[Sequence[int]], random_G: torch.Tensor,
                sampling: Sampling) -> torch.Tensor:
    """[G] token ids, each by its own row, its own history and its own random number.

    Args:
        seen: token ids of each sequence so far, for the penalty.
        random_G: uniform in [0, 1), float64 on any device; not read at temperature 0.
    """
    if sampling.repetition_penalty != 1:
        logits_GV = penalised(logits_GV, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_GV.argmax(-1)
    exact = torch.float32 if logits_GV.device.type == "mps" else torch.float64  # which has no float64
    probs_GV = filtered(logits_GV.to(exact) / sampling.temperature, sampling).softmax(-1)
    cumulative_GV = probs_GV.cumsum(-1)
    wanted_G1 = (random_G.to(exact).to(logits_GV.device) * cumulative_GV[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative_GV, wanted_G1, right=True).squeeze(1).clamp(max=logits_GV.shape[1] - 1)


def penalised(logits_GV: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Logits in which tokens that a sequence has are less likely (penalty above 1) or likelier (below 1)."""
    logits_GV = logits_GV.clone()
    for row, ids in zip(logits_GV, seen):
        known = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=row.device)
        row[known] = torch.where(row[known] > 0, row[known] / penalty, row[known] * penalty)
    return logits_GV


def filtered(logits_GV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits, -inf where a token is not to be drawn; the likeliest always may be."""
    if 0 < sampling.top_k < logits_GV.shape[1]:
        least_G1 = logits_GV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_GV = logits_GV.masked_fill(logits_GV < least_G1, -torch.inf)
    if sampling.top_p < 1:
        probs_GV, order_GV = logits_GV.softmax(-1).sort(dim=-1, descending=True, stable=True)
        enough_GV = probs_GV.cumsum(-1) - probs_GV >= sampling.top_p  # without this token there is enough already
        logits_GV = logits_GV.masked_fill(torch.zeros_like(enough_GV).scatter(-1, order_GV, enough_GV), -torch.inf)
    if sampling.min_p > 0:
        probs_GV = logits_GV.softmax(-1)
        logits_GV = logits_GV.masked_fill(probs_GV < sampling.min_p * probs_GV.amax(-1, keepdim=True), -torch.inf)
    return logits_GV
