"""Rows as bytes: errors of rounding within their bounds, and several tensors in one buffer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.dispatch.wire import as_bytes, decode_rows, encode_rows, pack, packed_bytes, row_bytes, unpack

WIRES = [None, torch.bfloat16, torch.int8]


def carried(rows, wire):
    encoded = encode_rows(rows, wire)
    assert encoded.shape == (len(rows), row_bytes(rows.shape[1], rows.dtype, wire)) and encoded.dtype == torch.uint8
    decoded = decode_rows(encoded, rows.dtype, wire)
    assert decoded.dtype == rows.dtype
    return decoded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(count=st.integers(0, 4), width=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([1e-20, 1.0, 1e20]))
def test_errors_are_bounded(dtype, count, width, seed, scale):
    rows = (scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)
    assert torch.equal(carried(rows, None), rows)
    own_rounding = torch.finfo(dtype).eps  # of the result in the rows' dtype
    error = (carried(rows, torch.bfloat16).double() - rows.double()).abs()
    assert bool((error <= rows.double().abs() * 2**-8).all())
    error = (carried(rows, torch.int8).double() - rows.double()).abs()
    largest = rows.double().abs().amax(1, keepdim=True)
    assert bool((error <= largest * (1 / 254 + 1e-6 + own_rounding)).all())


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_zeros_stay_and_what_is_not_finite_shows(wire):
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    decoded = carried(rows, wire)
    assert decoded[0].tolist() == [0, 0] and not decoded[1:].isfinite().all(1).any()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=4))
def test_columns_come_back(lengths):
    rows, pairs = map(list, zip(*lengths))
    columns = [torch.randn(sum(rows), 3), torch.randn(sum(pairs), dtype=torch.float64), torch.arange(sum(pairs)).int()]
    packed = [as_bytes(columns[0]), *(as_bytes(c.unsqueeze(1)) for c in columns[1:])]
    of_all, sizes = [rows, pairs, pairs], [12, 8, 4]
    buffer = pack(packed, of_all)
    assert packed_bytes(of_all, sizes) == [12 * r + 12 * p for r, p in lengths]
    assert len(buffer) == sum(packed_bytes(of_all, sizes))
    back = unpack(buffer, of_all, sizes)
    assert torch.equal(back[0].view(torch.float32), columns[0])
    assert torch.equal(back[1].view(torch.float64).squeeze(1), columns[1])
    assert torch.equal(back[2].view(torch.int32).squeeze(1), columns[2])
