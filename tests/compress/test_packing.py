"""Packing: round trips for every width and odd shapes, real bytes, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedist.compress.packing import PLANES, pack, packed_width, unpack
from moedist.errors import CompressError
from tests.compress.cases import quick, seeds


@quick
@given(st.sampled_from(list(PLANES)), st.integers(0, 5), st.integers(1, 40), seeds)
def test_round_trip(bits, rows, columns, seed):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns).long(), codes)
    if columns % 8 == 0:
        assert packed.nbytes == rows * columns * bits // 8, "as many bytes as bits, none to spare"


@pytest.mark.parametrize("bits", PLANES)
def test_every_code_in_every_place(bits):
    for place in range(9):
        codes = torch.zeros(2**bits, 9, dtype=torch.int64)
        codes[:, place] = torch.arange(2**bits)
        assert torch.equal(unpack(pack(codes, bits), bits, 9).long(), codes)


def test_refusals():
    with pytest.raises(CompressError, match="5 bits cannot be packed: choose 2, 3, 4, 8"):
        pack(torch.zeros(1, 1), 5)
    with pytest.raises(CompressError, match="codes from 0 to 4 do not fit 2 bits, 0 to 3"):
        pack(torch.tensor([[0, 4]]), 2)
    with pytest.raises(CompressError, match="rows of 2 bytes do not hold 20 codes of 3 bits, which take 8"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 3, 20)
