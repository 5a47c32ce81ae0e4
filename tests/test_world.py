"""Finding launchers and devices."""

import pytest
import torch

from moedist.errors import WorldError
from moedist.world import Launch, World, find_launch, pick_device, vendor_of
from tests.ranks import run_ranks


@pytest.mark.parametrize("env, expected", [
    ({}, Launch(0, 1, 0, "single process")),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(3, 8, 1, "torchrun")),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch(1, 2, 1, "mpi")),
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


def test_devices():
    assert pick_device("cpu", Launch(0, 1, 0, "")) == torch.device("cpu")
    assert vendor_of(torch.device("cpu")) == "cpu" and vendor_of(torch.device("mps")) == "apple"
    if not torch.accelerator.is_available():
        assert pick_device("auto", Launch(0, 1, 0, "")) == torch.device("cpu")
        with pytest.raises(WorldError, match="rank 1.*no accelerator"):
            pick_device("cpu,cuda", Launch(1, 2, 1, ""))


def talk(world: World):
    total = world.all_reduce_(torch.tensor([float(world.rank), 1.0]))
    top = world.all_reduce_(torch.tensor([world.rank]), "max")
    return total.tolist(), top.item(), world.gather_objects(world.rank * 2), world.broadcast_object(world.rank + 5)


def test_control_collectives():
    assert run_ranks(3, talk) == [([3.0, 3.0], 2, [0, 2, 4], 5)] * 3
    assert run_ranks(1, talk) == [([0.0, 1.0], 0, [0], 5)]


@pytest.mark.gpu
def test_accelerator_is_found():
    device = pick_device("auto", Launch(0, 1, 0, ""))
    assert device.type == torch.accelerator.current_accelerator().type and vendor_of(device) != "cpu"
