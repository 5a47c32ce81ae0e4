"""One token cache for all tests of this room, in this process as in those that it starts."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_process(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEDIST_CACHE", str(cache))
        yield
