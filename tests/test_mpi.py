"""MPI where it is not what it should be."""

import subprocess
import sys

import pytest

from moedist.errors import WorldError
from moedist.mpi import refuse_thread_level
from tests.launching import QUICKSTART, ROOT, environment
from tests.ranks import mpirun


@pytest.mark.parametrize("level, name", [(0, "SINGLE"), (1, "FUNNELED")])
def test_too_low_a_thread_level_is_refused(level, name):
    with pytest.raises(WorldError, match=f"MPICH 4.2.0.*MPI_THREAD_{name}.*MPI_THREAD_SERIALIZED or above"):
        refuse_thread_level(level, "MPICH 4.2.0")


@pytest.mark.parametrize("level", [2, 3])
def test_enough_threads(level):
    refuse_thread_level(level, "MPICH 4.2.0")


def test_ranks_that_mpi_did_not_start_are_refused(cache):
    mpirun(1)  # or skip
    done = subprocess.run([sys.executable, "-m", "moedist", "probe", *QUICKSTART, "world.transport=mpi"], cwd=ROOT,
                          env={**environment(cache), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "torchrun started 2 ranks but MPI" in done.stderr and "sees 1" in done.stderr and "mpirun -n 2" in done.stderr


def test_mpi_is_imported_only_when_asked_for():
    code = "import sys, moedist.world, moedist.dispatch; assert not [m for m in sys.modules if m.startswith('mpi4py')]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
