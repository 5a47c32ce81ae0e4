"""MPI, imported only where it is asked for, and started here rather than by the import.

Nothing of it is ended when the process ends by an error: its clean-up would wait for ranks that may be gone. `end_process`
then ends all ranks, also under launchers that would let the others wait for ever.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from typing import Any, NoReturn, Optional

from moedist.errors import WorldError

PASSED_ON_S = 1.0  # that mpirun needs to print what ranks have said: at an abort it forgets what it has not passed on

_mpi: Optional[Any] = None  # the module mpi4py.MPI, while MPI is up
_started_here = False


def start_mpi(rank: int, size: int, launcher: str) -> Any:
    """A communicator of all ranks, numbered as the launcher has numbered them.

    The thread level must be MPI_THREAD_SERIALIZED or above: on accelerators, autograd's backward runs in other threads.

    Raises:
        WorldError: no MPI here, too low a thread level, or MPI sees other ranks than the launcher started.
    """
    global _mpi, _started_here
    way = ("world.transport=mpi needs mpi4py: pip install 'moedist[mpi]' where the site has an MPI, 'moedist[mpich]' where it "
           "has none; or set world.transport=torchdist")
    try:
        import mpi4py
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise WorldError(f"rank {rank} cannot import MPI ({' '.join(str(error).split())}); {way}", told_by="host") from error
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        _started_here = True
    _mpi = MPI
    found = MPI.COMM_WORLD.Get_size()
    if found != size:
        raise WorldError(f"{launcher} started {size} ranks but MPI ({mpi_version()}) sees {found}: it was not MPI that "
                         "started them, or another MPI than mpi4py's; start with the mpirun of that MPI "
                         f"(mpirun -n {size} python -m moedist ...) or with srun --mpi=pmi2 or pmix, or set "
                         "world.transport=torchdist", told_by="host")
    refuse_thread_level(MPI.Query_thread(), mpi_version())
    return MPI.COMM_WORLD.Split(0, rank)


def refuse_thread_level(level: int, version: str) -> None:
    """Raise `WorldError` where MPI may be called from one thread only. `level` counts from 0, as MPI.Query_thread does."""
    names = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE")
    if level < names.index("MPI_THREAD_SERIALIZED"):
        raise WorldError(f"this MPI ({version}) gives {names[level]}, but backward passes call it from other threads: it must "
                         "give MPI_THREAD_SERIALIZED or above; take an MPI built with threads, or set "
                         "world.transport=torchdist", told_by="host")


def mpi_version() -> str:
    """Name and version of the library, such as 'MPICH 4.2.0'."""
    if _mpi is None:
        return "no MPI"
    line = _mpi.Get_library_version().splitlines()[0].split(",")[0]
    return " ".join(line.replace("Version:", " ").split())


def mpirun(ranks: int) -> list[str]:
    """How this machine's mpirun starts so many processes.

    Raises:
        WorldError: there is none, or no mpi4py.
    """
    if shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None:
        raise WorldError("mpirun and mpi4py are needed: pip install 'moedist[mpi]' where the site has an MPI (load its module "
                         "first), 'moedist[mpich]' where it has none")
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    as_root = ["--allow-run-as-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    options = ["--oversubscribe", *as_root] if "Open MPI" in said else []
    return ["mpirun", *options, "-n", str(ranks)]


def finish_mpi() -> None:
    """End MPI on this rank, as all ranks do at the end of a good run."""
    global _mpi
    if _mpi is not None and _started_here and not _mpi.Is_finalized():
        _mpi.Finalize()
    _mpi = None


def end_process() -> NoReturn:
    """End by an error: under MPI all ranks with this one, else this one at once, without a clean-up that waits for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _mpi is not None and not _mpi.Is_finalized():
        time.sleep(PASSED_ON_S)
        _mpi.COMM_WORLD.Abort(1)
    os._exit(1)
