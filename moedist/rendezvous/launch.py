"""Rank and size as the launcher says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Mapping, Optional

from moedist.errors import WorldError

# launcher, then its variables for rank, size and local rank
VARIABLES = (("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
             ("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
             ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
             ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
MPI_LAUNCHERS = ("openmpi", "mpi")


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment variables say.

    Attributes:
        local_rank: of the ranks on this host; None where no variable says it, then hosts are counted (`local_rank_of`).
        launcher: torchrun (or anything that sets its variables), openmpi, mpi (MPICH and those like it), slurm, or single
            process.
    """

    rank: int
    size: int
    local_rank: Optional[int]
    launcher: str

    @property
    def by_mpi(self) -> bool:
        """Whether mpirun started this process."""
        return self.launcher in MPI_LAUNCHERS


def find_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's, MPI's or Slurm's variables, in this order; a lone process is a world of one.

    Under `srun --mpi=pmi2` a task has the variables of both: Slurm started it.

    Raises:
        WorldError: a variable is not a number, or the rank is outside the world.
    """
    for launcher, rank, size, local in VARIABLES:
        # an interactive Slurm shell sets SLURM_NTASKS without starting tasks: a step is named by SLURM_STEP_ID
        if rank in env and size in env and (launcher != "slurm" or "SLURM_STEP_ID" in env):
            if launcher == "mpi" and local not in env and _is_slurm_task(env):
                continue
            try:
                found = Launch(int(env[rank]), int(env[size]), int(env[local]) if local in env else None, launcher)
            except ValueError as error:
                raise WorldError(f"{rank}={env[rank]!r}, {size}={env[size]!r}, {local}={env.get(local)!r}: not whole numbers; "
                                 "start with torchrun, mpirun or srun") from error
            if not 0 <= found.rank < found.size:
                raise WorldError(f"{rank}={found.rank} is outside the world of {size}={found.size}; check the launcher")
            return found
    return Launch(0, 1, 0, "single process")


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process itself, not mpirun's helper on this node, of which it would have the variables."""
    return ("SLURM_STEP_ID" in env and env.get("SLURM_PROCID") == env["PMI_RANK"]
            and env.get("SLURM_NTASKS") == env["PMI_SIZE"])
