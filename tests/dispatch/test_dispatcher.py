"""Dispatch by hand: ten rows, two ranks; and the number of collectives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.dispatch import Dispatcher, Layout, build_transport
from moedist.dispatch.layout import split_rows
from moedist.placement import LayerPlan, split_batch
from moedist.routing import RouterInput
from tests.dispatch.counting import Counting
from tests.moe_cases import Case, build_layer
from tests.ranks import run_ranks

# rank 0 owns experts 0 and 3, rank 1 owns 1, rank 2 nothing, rank 1 also 2
OWNERS = [0, 1, 1, 0]
# rows of each rank: (token, expert)
ROWS = {0: [(0, 3), (0, 1), (1, 0), (2, 1)], 1: [(0, 0), (0, 2), (1, 0), (1, 3)], 2: [(0, 1), (0, 3)]}
TOKENS = {0: 3, 1: 2, 2: 1}


def values(rank: int) -> torch.Tensor:
    """Token t of rank r is the number 100 r + t, in both columns."""
    return (100.0 * rank + torch.arange(TOKENS[rank], dtype=torch.float64)).unsqueeze(1).repeat(1, 2)


def dispatch_by_hand(world):
    layout = Layout(LayerPlan.single(OWNERS), world.rank, world.size)
    d = Dispatcher(layout, build_transport(world))
    tokens, experts = (torch.tensor(v) for v in zip(*ROWS[world.rank]))
    rows, meta = d.dispatch(values(world.rank), tokens, experts, extra=torch.tensor([world.rank]))
    scale = torch.cat([torch.full((n, 1), 10.0 ** e) for e, n in zip(layout.local_experts, meta.expert_counts_L)] or
                      [torch.zeros(0, 1)])
    y = d.combine(rows * scale, torch.arange(1, len(tokens) + 1, dtype=torch.float64), meta)
    return rows[:, 0].tolist(), meta.expert_counts_L, meta.load_WE.tolist(), meta.extra_W.tolist(), y[:, 0].tolist()


def test_ten_rows_by_hand():
    r0, r1, r2 = run_ranks(3, dispatch_by_hand)
    # own rows first, then by rank; sorted by expert
    assert r0[0] == [1, 100, 101, 0, 101, 200] and r0[1] == [3, 3]
    assert r1[0] == [0, 2, 200, 100] and r1[1] == [3, 1]
    assert r2[0] == [] and r2[1] == []
    assert r0[2] == r1[2] == r2[2] == [[1, 2, 0, 1], [2, 0, 1, 1], [0, 1, 0, 1]]
    assert r0[3] == [[0], [1], [2]]
    # expert e multiplies by 10^e, row i of a rank's list has weight i + 1
    assert r0[4] == [0, 3 * 1, 4 * 2 * 10]
    assert r1[4] == [1 * 100 + 2 * 100 * 100, 3 * 101 + 4 * 101 * 1000]
    assert r2[4] == [1 * 200 * 10 + 2 * 200 * 1000]


def count_collectives(world, sequences):
    layer, _ = build_layer(world, Case((0, 0, 0, 0), sequences))
    calls: list[str] = []
    layer.dispatcher.transport = Counting(layer.dispatcher.transport, "rows", calls)
    x = torch.randn(sequences[world.rank], 6, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    y, _ = layer(RouterInput(x, ids, ids, 0, True))
    forward = [call for call in calls if call != "rows done"]
    done = len(calls)
    y.sum().backward()
    return forward, [call for call in calls[done:] if call != "rows done"]


@pytest.mark.parametrize("transport", ["torchdist", "mpi"])
def test_one_count_exchange_and_two_row_exchanges_each_way(transport):
    for sequences in ((2, 1), (0, 3), (0, 0)):
        for forward, backward in run_ranks(2, count_collectives, sequences, transport=transport):
            assert forward == ["counts", "rows", "rows"] and backward == ["rows", "rows"]


def test_copies_take_their_shares_and_rows_stay_where_a_copy_is():
    # 4, 0 and 2 rows; half for the copy on rank 0, half for that on rank 2: rank 0 sends one row, rank 2 keeps its two
    assert split_rows(torch.tensor([4, 0, 2]), [0, 2], (0.5, 0.5)).tolist() == [[3, 1], [0, 0], [0, 2]]
    assert split_rows(torch.tensor([0, 5, 0]), [0, 2], (0.4, 0.6)).tolist() == [[0, 0], [2, 3], [0, 0]]
    assert split_rows(torch.tensor([0, 0, 0]), [0, 1, 2], (0.2, 0.3, 0.5)).tolist() == [[0] * 3] * 3


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.data())
def test_split_rows_conserves(rows, data):
    owners = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    parts = data.draw(st.lists(st.integers(0, 9), min_size=len(owners), max_size=len(owners)).filter(any))
    shares = tuple(p / sum(parts) for p in parts)
    split = split_rows(torch.tensor(rows), owners, shares)
    assert split.sum(1).tolist() == rows and bool((split >= 0).all())
    assert split.sum(0).tolist() == split_batch(sum(rows), shares)
    for copy, owner in enumerate(owners):
        assert split[owner, copy] == min(rows[owner], split[:, copy].sum()), "a rank keeps what its copy has room for"

def test_rows_go_to_a_copy_in_the_same_island_if_there_is_room():
    """Ranks 0 and 2 are one island, 1 and 3 the other; copies on 0 and 3."""
    rows = torch.tensor([1, 5, 4, 2])
    near = split_rows(rows, [0, 3], (0.5, 0.5), (0, 1, 0, 1))
    assert near.tolist() == [[1, 0], [1, 4], [4, 0], [0, 2]], "one row has to cross: island 0 has 5, and its copy takes 6"
    assert near.sum(0).tolist() == split_rows(rows, [0, 3], (0.5, 0.5)).sum(0).tolist() == [6, 6]
    assert (near.sum(1) == rows).all()
