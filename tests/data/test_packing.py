"""Every token predicted once, and an order that depends on nothing but the seed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.data.packing import IGNORED, EvalStream, TrainStream, permutation
from moedist.errors import DataError

lengths = st.integers(1, 9)


def arange(n):
    return np.arange(n, dtype=np.uint16)


@given(n=st.integers(2, 200), length=lengths, seed=st.integers(-5, 2**70), epoch=st.integers(0, 5))
def test_an_epoch_shows_every_whole_sequence_once(n, length, seed, epoch):
    if n <= length:
        return
    stream = TrainStream(arange(n), length, seed)
    inputs, targets = stream.batch(epoch * stream.sequences, stream.sequences)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # tokens are 0, 1, 2, ...: the target is the next one
    assert sorted(targets.flatten().tolist()) == list(range(1, stream.sequences * length + 1))
    assert stream.sequences == (n - 1) // length


@given(shares=st.lists(st.integers(0, 7), min_size=1, max_size=6), first=st.integers(0, 50), seed=st.integers(0, 9))
def test_any_partition_over_ranks_reads_the_same(shares, first, seed):
    whole = TrainStream(arange(60), 4, seed).batch(first, sum(shares))
    parts, position = [], first
    for share in shares:  # each rank has a stream of its own, and counts may be 0
        parts.append(TrainStream(arange(60), 4, seed).batch(position, share))
        position += share
    for all_rows, rows in zip(whole, zip(*parts)):
        assert all_rows.shape == (sum(shares), 4)
        assert torch.equal(all_rows, torch.cat(rows))


@given(stop=st.integers(0, 70), seed=st.integers(0, 9))
def test_resume_in_mid_epoch_goes_on_where_it_stopped(stop, seed):
    stream = TrainStream(arange(100), 5, seed)  # 19 sequences: the batches cross epochs
    steps = [stream.batch(p, 3)[0] for p in range(0, 90, 3)]
    resumed = TrainStream(arange(100), 5, seed)
    start = stop // 3 * 3
    assert torch.equal(torch.cat(steps[start // 3:]), resumed.batch(start, 90 - start)[0])


def test_epochs_and_seeds_differ():
    stream = TrainStream(arange(1000), 4, 0)
    n = stream.sequences
    assert not torch.equal(stream.batch(0, n)[0], stream.batch(n, n)[0])
    assert not torch.equal(stream.batch(0, n)[0], TrainStream(arange(1000), 4, 1).batch(0, n)[0])


def test_permutation_is_fixed_for_good():
    # A changed order would break the resume of every run there is, and the agreement of ranks with other versions.
    assert permutation(8, seed=0, epoch=0).tolist() == RECORDED
    order = permutation(20_000, 3, 1)
    assert sorted(order.tolist()) == list(range(20_000))
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


RECORDED = [5, 6, 1, 2, 3, 4, 0, 7]


@given(n=st.integers(2, 120), length=lengths, limit=st.none() | st.integers(1, 130), ranks=st.integers(1, 5))
def test_evaluation_predicts_every_token_once(n, length, limit, ranks):
    stream = EvalStream(arange(n), length, limit)
    per_rank = -(-stream.sequences // ranks)  # equal numbers of calls, the last ones past the end
    seen = []
    for rank in range(ranks):
        inputs, targets = stream.batch(rank * per_rank, per_rank)
        assert inputs.shape == targets.shape == (per_rank, length)
        real = targets != IGNORED
        assert torch.equal(targets[real], inputs[real] + 1)
        assert not inputs[~real].any()
        seen += targets[real].tolist()
    assert seen == list(range(1, min(n - 1, limit or n) + 1))


def test_evaluation_past_the_end_and_of_nothing():
    stream = EvalStream(arange(10), 4)
    assert stream.sequences == 3
    assert (stream.batch(3, 2)[1] == IGNORED).all()
    assert (stream.batch(500, 1)[1] == IGNORED).all()
    assert stream.batch(0, 0)[0].shape == TrainStream(arange(10), 4, 0).batch(7, 0)[0].shape == (0, 4)


def test_errors_carry_the_numbers():
    with pytest.raises(DataError, match="has 8 tokens but one sequence needs 9; set data.sequence_length=7"):
        TrainStream(arange(8), 8, 0)
    with pytest.raises(DataError, match="evaluation of 1 tokens"):
        EvalStream(arange(1), 8)
    with pytest.raises(ValueError, match="must be 0 or more"):
        TrainStream(arange(9), 8, 0).batch(-1, 2)


def test_reads_from_a_memory_map(tmp_path):
    np.save(tmp_path / "a.npy", arange(50))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert torch.equal(TrainStream(mapped, 6, 0).batch(0, 20)[1], TrainStream(arange(50), 6, 0).batch(0, 20)[1])
