"""The tokens that make neurons fire most. n tokens of a batch, J neurons, k places."""

from __future__ import annotations

from typing import Callable, Iterable, Sequence

import torch

SPARE = 8  # candidates for every place: the same words in the same place of other sequences give the same value


class TopTokens:
    """The tokens of largest |h| of each neuron, over batches. Takes 12 J k SPARE bytes.

    Attributes:
        values: float32 [J, k * SPARE], h, by |h| descending; 0 where there are fewer tokens.
        keys: int64 [J, k * SPARE], which token it was; -1 where there are fewer.
    """

    def __init__(self, neurons: int, most: int, device: torch.device | str = "cpu"):
        self.values = torch.zeros(neurons, most * SPARE, device=device)
        self.keys = torch.full((neurons, most * SPARE), -1, dtype=torch.int64, device=device)

    def add(self, h_nJ: torch.Tensor, keys_n: torch.Tensor) -> None:
        """Take in a batch: what each token made of each neuron, and the tokens' keys, at least 0."""
        values = torch.cat([self.values, h_nJ.t().to(self.values.dtype)], 1)
        keys = torch.cat([self.keys, keys_n.expand(len(values), -1)], 1)
        order = values.abs().topk(self.values.shape[1], dim=1).indices
        self.values, self.keys = values.gather(1, order), keys.gather(1, order)

    def of(self, neuron: int) -> list[tuple[int, float]]:
        """(key, h) of a neuron, largest |h| first, equal ones by key."""
        found = zip(self.keys[neuron].tolist(), self.values[neuron].tolist())
        return sorted(((key, h) for key, h in found if key >= 0 and h), key=lambda pair: (-abs(pair[1]), pair[0]))


def distinct(found: Iterable[tuple[int, float]], ids: Sequence[int], length: int, most: int,
             same: int = 3) -> list[tuple[int, float]]:
    """The first `most` of (key, h) whose last `same` words, within a sequence of `length` tokens, differ.

    >>> distinct([(5, 9.0), (2, 9.0), (1, 4.0)], [7, 8, 9, 7, 8, 9], 3, 2)
    [(5, 9.0), (1, 4.0)]
    """
    seen, chosen = set(), []
    for key, h in found:
        start = key - key % length
        words = tuple(int(i) for i in ids[max(start, key - same + 1):key + 1])
        if words not in seen and len(chosen) < most:
            seen.add(words)
            chosen.append((key, h))
    return chosen


def context(ids: Sequence[int], key: int, length: int, decode: Callable[[Iterable[int]], str], before: int = 40,
            after: int = 16) -> tuple[str, str]:
    """The text before a token that the model saw, and the text behind it.

    Args:
        ids: all tokens, in sequences of `length`; what is before the token's own sequence was not seen.
        before, after: characters shown, and as many tokens are looked at: a token has at least one, as a rule.
    """
    start = max(key - key % length, key - before)
    return decode(ids[start:key])[-before:], decode(ids[key + 1:key + 1 + after])[:after]
