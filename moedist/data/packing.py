"""Fixed-length sequences from one long row of token ids, in an order that every rank can work out for itself.

S tokens a sequence. A position in the data is one integer, counted over all ranks and epochs: a rank asks for the
positions that are its own, however many they are, and a resumed run goes on from the number it stopped at.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from moedist.errors import DataError

IGNORED = -100  # a target that torch's cross_entropy leaves out


class TrainStream:
    """Training sequences without end, every epoch in an order of its own.

    Sequence i reads tokens i*S .. i*S+S-1 and predicts i*S+1 .. i*S+S; the up to S-1 tokens after the last whole
    sequence are not used. Position p is in epoch p // `sequences`.

    Args:
        tokens: token ids [n], an array or memory map of any integer type.
        sequence_length: S.
        seed: the order depends on (seed, epoch) and on nothing else.

    Raises:
        DataError: fewer than S + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, seed: int):
        self.sequences = (len(tokens) - 1) // sequence_length
        if self.sequences < 1:
            raise DataError(f"the training text has {len(tokens)} tokens but one sequence needs {sequence_length + 1}; "
                            f"set data.sequence_length={max(1, len(tokens) - 1)} or less, or give more text")
        self._tokens = tokens
        self._length = sequence_length
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [count, S] each, of positions first .. first+count-1; count may be 0."""
        _check_range(first, count)
        positions = [divmod(position, self.sequences) for position in range(first, first + count)]
        starts = np.array([self._order(epoch)[i] for epoch, i in positions], np.int64) * self._length
        rows = np.asarray(self._tokens[starts[:, None] + np.arange(self._length + 1)]).astype(np.int64)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch may cross from one epoch into the next
                del self._orders[min(self._orders)]
            self._orders[epoch] = permutation(self.sequences, self._seed, epoch)
        return self._orders[epoch]


class EvalStream:
    """Every token after the first exactly once as a target, in order, in sequences of S.

    The last sequence is filled up with the target -100. Positions from `sequences` on are all -100, so that ranks with
    unequal shares can make the same number of calls.

    Args:
        tokens: token ids [n], n >= 2.
        sequence_length: S.
        max_tokens: predict only the first so many targets (None: all).

    Raises:
        DataError: fewer than 2 tokens, so nothing to predict.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, max_tokens: int | None = None):
        if len(tokens) < 2 or (max_tokens is not None and max_tokens < 1):
            raise DataError(f"an evaluation of {len(tokens)} tokens (at most {max_tokens} targets) predicts nothing; "
                            "give more text, raise data.valid_fraction, or set train.eval_tokens to 1 or more")
        self.targets = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
        self.sequences = -(-self.targets // sequence_length)
        self._tokens = tokens
        self._length = sequence_length

    def head(self, sequences: int) -> "EvalStream":
        """The first so many sequences alone; fewer where there are not as many."""
        return EvalStream(self._tokens, self._length, min(self.targets, sequences * self._length))

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [count, S] each, of sequences first .. first+count-1; count may be 0."""
        _check_range(first, count)
        inputs = np.zeros(count * self._length, np.int64)  # 0 is a valid id of every tokenizer
        targets = np.full(count * self._length, IGNORED, np.int64)
        start = min(first * self._length, self.targets)
        stop = min((first + count) * self._length, self.targets)
        inputs[: stop - start] = self._tokens[start:stop]
        targets[: stop - start] = self._tokens[start + 1:stop + 1]
        shape = (count, self._length)
        return torch.from_numpy(inputs.reshape(shape)), torch.from_numpy(targets.reshape(shape))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n), int64 [n], that is the same on every machine.

    Ranks of one job may have different builds of numpy and torch, whose random streams are not promised to agree; a
    rank with another order would train on some sequences twice. So: sort the numbers by a hash (SplitMix64, Steele et
    al. 2014), which is plain integer arithmetic.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "little")
    z = np.uint64(start) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable").astype(np.int64)


def _check_range(first: int, count: int) -> None:
    if first < 0 or count < 0:
        raise ValueError(f"first ({first}) and count ({count}) must be 0 or more")
