"""Links that are really bad: two network namespaces, and a queue that is slow one way or drops large packets."""

import subprocess
import sys

import pytest

from moedist.bench.shaped_link import ShapedLink, lacking
from tests.launching import ROOT, TINY, environment
from tests.ranks import needs

TRAIN = ["train", "configs/quickstart.yaml", *TINY, "placement.counts=[4,4]", "phases=[{train: 2}]", "world.islands=[nv,amd]"]


@pytest.fixture
def link():
    needs(lacking())
    with ShapedLink() as link:
        yield link


def run_both(link, cache, arguments):
    """(exit code, output) of both ranks."""
    ranks = [link.start(r, [sys.executable, "-m", "moedist", *arguments], r, 2, cwd=ROOT, env=environment(cache),
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    texts = [rank.communicate(timeout=150)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, texts)]


def test_a_direction_that_is_slow_is_named(link, cache, tmp_path):
    link.shape(0, 1e9)
    link.shape(1, 1e8)
    path = tmp_path / "links.json"
    (code, text), (other, quiet) = run_both(link, cache, ["probe", "configs/quickstart.yaml", "--links", "--json", str(path),
                                                          "world.islands=[nv,amd]"])
    assert code == other == 0, text + quiet
    assert "2 ranks by torchrun in 2 islands" in text and "wrong bytes" in text and path.exists()
    (warning,) = [line for line in text.splitlines() if line.startswith("warning")]
    assert "(island amd) -> rank 0 on" in warning and " carries 1" in warning


def test_large_packets_that_vanish_end_a_training_before_it_starts(link, cache, tmp_path):
    """As on a path whose MTU is smaller than either host knows: ranks meet, and hang at the first rows."""
    link.shape(1, 1e9, burst=1000)
    found = run_both(link, cache, [*TRAIN, f"folder={tmp_path}/runs"])
    assert [code for code, _ in found] == [1, 1]
    (line,) = [line for _, text in found for line in text.splitlines() if "moedist: error" in line]
    assert "262,144 bytes rank 1 on" in line and "(island nv) did not arrive (" in line and "512 bytes did" in line
    assert "the same MTU" in line and not any("Traceback" in text for _, text in found)
    assert not (tmp_path / "runs").exists()
