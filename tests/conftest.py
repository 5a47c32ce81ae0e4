"""What all tests share."""

import os

import hypothesis
import pytest
import torch

# The same examples in every CI run, so that a failure there is about the change; other examples each time elsewhere.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
torch.set_num_threads(2)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def own_environment():
    """What a test, or a library in it, writes into the environment does not reach the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A token cache of this test session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def watched(cache, tmp_path_factory):
    """The run folder of `tests.watched_run`, trained when a test first wants it; not to be changed."""
    from tests.watched_run import watched_run
    return watched_run(tmp_path_factory.mktemp("watched"), cache)


@pytest.fixture
def one_thread():
    """Two threads that meet after every small operation take ten times as long as one on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need an accelerator; elsewhere they are skipped, and say so."""
    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator here: torch.accelerator.is_available() is False"))
