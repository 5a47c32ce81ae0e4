"""A .npy file written without knowing its length."""

import numpy as np
import pytest

from moedist.data.token_file import open_tokens, write_tokens


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_reads_back_as_a_read_only_map(tmp_path, dtype):
    parts = [np.arange(5), np.zeros(0, np.int64), np.array([65535])]
    assert write_tokens(tmp_path / "a.npy", np.dtype(dtype), iter(parts)) == 6
    ids = open_tokens(tmp_path / "a.npy")
    assert isinstance(ids, np.memmap)
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [0, 1, 2, 3, 4, 65535]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
