"""Devices, and collectives of a world."""

import doctest

import pytest
import torch

import moedist.world
from moedist.errors import WorldError
from moedist.rendezvous.launch import Launch
from moedist.world import World, pick_device, vendor_of
from tests.ranks import run_ranks


def test_devices():
    assert pick_device("cpu", Launch(0, 1, 0, "")) == torch.device("cpu")
    assert vendor_of(torch.device("cpu")) == "cpu" and vendor_of(torch.device("mps")) == "apple"
    if not torch.accelerator.is_available():
        assert pick_device("auto", Launch(0, 1, 0, "")) == torch.device("cpu")
        with pytest.raises(WorldError, match="rank 1.*no accelerator"):
            pick_device("cpu,cuda", Launch(1, 2, 1, ""))


def test_doctests():
    assert doctest.testmod(moedist.world).failed == 0


@pytest.mark.parametrize("mpi, native, crowded, several, carrier, why", [
    (True, False, (), False, "mpi", "a core for every rank"),
    (True, False, ("n1",), False, "torchdist", "more ranks than cores on n1"),
    (True, True, (), False, "torchdist", "accelerators of one vendor"),
    (True, True, (), True, "mpi", "a core for every rank"),
    (False, False, (), True, "torchdist", "started by slurm")])
def test_auto_chooses_a_carrier_and_says_why(mpi, native, crowded, several, carrier, why):
    """Between islands native groups are of no use, though all ranks have one."""
    world = World(size=2, mpi=object() if mpi else None, native=object() if native else None, crowded=crowded)
    world._choose_carrier("auto", "started by slurm", several)
    assert world.carrier == carrier and why in world.transport_why
    world._choose_carrier("torchdist", "", several)
    assert world.carrier == "torchdist" and world.transport_why == "as configured"


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
