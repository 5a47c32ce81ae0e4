"""`moedist bench dispatch`, in a few rounds."""

import json
import subprocess
import sys

from moedist.bench.dispatch import SIZES, Payload
from moedist.world import World
from tests.launching import ROOT, environment
from tests.ranks import mpirun


def test_every_rank_sends_as_many_bytes_as_are_asked_for():
    for size in (2, 3, 4):
        payloads = [Payload(World(rank=r, size=size), 4096) for r in range(size)]
        for r, payload in enumerate(payloads):
            assert payload.sent.nbytes == 4096 and payload.send[r] == 0 and max(payload.send) - sorted(payload.send)[1] <= 1
            assert payload.receive == [other.send[r] for other in payloads]


def test_it_starts_its_ranks_and_writes_the_figures(tmp_path, cache):
    mpirun(2)  # or skip
    path = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, "-m", "moedist", "bench", "dispatch", "--ranks", "2", "--rounds", "1", "--steps",
                           "0", "--json", str(path)], cwd=ROOT, env=environment(cache), capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert {f"dispatch.mpi_over_gloo.{size}" for size in SIZES} < set(figures)
    assert all(value > 0 for value in figures.values()) and "MPI over gloo" in done.stdout
