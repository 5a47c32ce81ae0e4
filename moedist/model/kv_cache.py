"""Keys and values of tokens that were computed before, so that the next token is computed alone.

G sequences in the cache, T new tokens in a pass, H query heads, J key/value heads, C head width, L longest sequence.

A token's slot in the cache is its position: sequences begin at slot 0 and differ in length (padding on the right). New
tokens of all sequences travel through the model as T sequences of one token, none of them padding, so that nothing but
real tokens is routed to experts; attention alone puts them side by side.
"""

from __future__ import annotations

from typing import Iterable, Sequence

import torch
from torch.nn import functional as F

BLOCK = 64  # slots that a cache grows by


class KVCache:
    """Of a model with so many blocks, for sequences that come and go.

    Before each pass `begin` says which sequences go on, and by how many tokens; then every block's attention calls
    `layers[i].attend`.

    Attributes:
        positions_T: of the new tokens of this pass.
    """

    def __init__(self, blocks: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.lengths: list[int] = []  # of the sequences, new tokens of this pass included
        self.layers = [LayerCache(self) for _ in range(blocks)]
        self.begin(0, [])

    def begin(self, first: int, counts: Sequence[int]) -> None:
        """Sequences first, first + 1, ... get `counts` new tokens each (at least one); those beyond the last are new.

        Args:
            counts: reaches to the last sequence: a pass is for all sequences, or for the newest.
        """
        self.lengths += [0] * (first + len(counts) - len(self.lengths))
        starts = self.lengths[first:]
        if len(starts) != len(counts) or not all(counts):
            raise ValueError(f"{len(counts)} counts for sequences {first} to {len(self.lengths) - 1}, each at least 1")
        self.lengths[first:] = [start + count for start, count in zip(starts, counts)]
        self.first, self.widest, self.longest = first, max(counts, default=0), max(self.lengths[first:], default=0)
        sequences_T = [i for i, count in enumerate(counts) for _ in range(count)]
        places_T = [j for count in counts for j in range(count)]
        self.sequences_T = torch.tensor(sequences_T, dtype=torch.int64, device=self.device)
        self.places_T = torch.tensor(places_T, dtype=torch.int64, device=self.device)
        starts_G = torch.tensor(starts, dtype=torch.int64, device=self.device)
        self.positions_T = starts_G[self.sequences_T] + self.places_T
        self.causal = not any(starts)  # all are new: slots are places
        self.mask_GQL = None
        if not self.causal and (self.widest > 1 or len(set(starts)) > 1):
            last_GQ = starts_G.unsqueeze(1) + torch.arange(self.widest, device=self.device)
            # beyond the tokens of a shorter sequence there are queries of no token, whose results are not read
            self.mask_GQL = torch.arange(self.longest, device=self.device) <= last_GQ.unsqueeze(2)

    def restart(self, sequence: int) -> None:
        """Forget the tokens of a sequence; it stays where it is."""
        self.lengths[sequence] = 0

    def keep(self, sequences: Iterable[int]) -> None:
        """Keep these only, in this order."""
        sequences = list(sequences)
        self.lengths = [self.lengths[i] for i in sequences]
        index = torch.tensor(sequences, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            layer.keep(index)


class LayerCache:
    """Keys and values of one block, [G, J, slots, C]."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self.keys = self.values = None

    def attend(self, q_TH1C: torch.Tensor, k_TJ1C: torch.Tensor, v_TJ1C: torch.Tensor) -> torch.Tensor:
        """[T, H, 1, C] of the new tokens: each sees the tokens of its sequence up to itself. Keeps their keys and values."""
        now = self._cache
        if not len(q_TH1C):
            return q_TH1C
        self._make_room(k_TJ1C, len(now.lengths), now.longest)
        rows_T = now.sequences_T + now.first
        self.keys[rows_T, :, now.positions_T] = k_TJ1C.squeeze(2)
        self.values[rows_T, :, now.positions_T] = v_TJ1C.squeeze(2)
        keys, values = (t[now.first:, :, :now.longest] for t in (self.keys, self.values))
        queries = q_TH1C
        if now.widest > 1:
            queries = q_TH1C.new_zeros(len(keys), q_TH1C.shape[1], now.widest, q_TH1C.shape[3])
            queries[now.sequences_T, :, now.places_T] = q_TH1C.squeeze(2)
        mask = None if now.mask_GQL is None else now.mask_GQL.unsqueeze(1)
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=now.causal and now.widest > 1,
                                           enable_gqa=queries.shape[1] != keys.shape[1])
        return y if now.widest == 1 else y[now.sequences_T, :, now.places_T].unsqueeze(2)

    def keep(self, index: torch.Tensor) -> None:
        if self.keys is not None:
            self.keys, self.values = self.keys[index], self.values[index]

    def _make_room(self, like_TJ1C: torch.Tensor, sequences: int, slots: int) -> None:
        if self.keys is None:
            shape = (0, like_TJ1C.shape[1], 0, like_TJ1C.shape[3])
            self.keys, self.values = like_TJ1C.new_zeros(shape), like_TJ1C.new_zeros(shape)
        more_slots = max(0, slots - self.keys.shape[2])
        more_slots = -(-more_slots // BLOCK) * BLOCK
        more = max(0, sequences - len(self.keys))
        if more or more_slots:
            pads = (0, 0, 0, more_slots, 0, 0, 0, more)
            self.keys, self.values = F.pad(self.keys, pads), F.pad(self.values, pads)
