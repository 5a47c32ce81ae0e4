"""The matrices here are small: a second thread only waits, for long where the machine is busy."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread while these tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
