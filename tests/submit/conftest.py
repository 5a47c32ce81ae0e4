"""One Slurm for all tests that want one."""

import os

import pytest

from tests.submit.cluster import Cluster, refused


@pytest.fixture(scope="session")
def started_cluster():
    if reason := refused():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    cluster = Cluster()
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def slurm(started_cluster, monkeypatch):
    """The cluster, and the variables that Slurm's commands need."""
    for name, value in started_cluster.environment.items():
        monkeypatch.setenv(name, value)
    return started_cluster
