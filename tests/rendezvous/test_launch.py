"""What launchers say in the environment."""

import pytest

from moedist.errors import WorldError
from moedist.rendezvous.launch import Launch, find_launch


@pytest.mark.parametrize("env, expected", [
    ({}, Launch(0, 1, 0, "single process")),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 8, 1, "torchrun")),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch(1, 2, None, "mpi")),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Launch(1, 2, 0, "mpi")),
    ({"RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 2, None, "torchrun")),
    # srun --mpi=pmi2, then mpirun's helper on the second node of an allocation
    ({"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
     Launch(3, 4, 1, "slurm")),
    ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2",
      "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, Launch(3, 4, 1, "mpi")),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
     Launch(1, 4, 0, "openmpi")),
    ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, Launch(2, 4, 0, "slurm")),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Launch(0, 1, 0, "single process")),  # a shell inside salloc
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"},
     Launch(0, 2, 0, "torchrun")),
])
def test_launchers(env, expected):
    assert find_launch(env) == expected


@pytest.mark.parametrize("env", [{"RANK": "a", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_broken_environment_is_named(env):
    with pytest.raises(WorldError, match="RANK"):
        find_launch(env)
