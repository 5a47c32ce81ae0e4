"""Where rank 0 is: from the user, by MPI, from Slurm, or on this host."""

import socket

import pytest

from moedist.errors import WorldError
from moedist.rendezvous.address import Address, find_address
from moedist.rendezvous.launch import Launch


class Comm:
    """An MPI communicator as rank 0 sees it; `hosts` are those of all ranks."""

    def __init__(self, hosts):
        self.hosts = hosts

    def allgather(self, value):
        assert value == socket.gethostname()
        return self.hosts

    def bcast(self, value, root):
        assert root == 0
        return value


def address(launch="torchrun", size=4, comm=None, **env) -> Address:
    return find_address(Launch(0, size, 0, launch), comm, None, env)


def test_what_the_user_says_comes_first():
    env = {"MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "1234", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "9"}
    assert str(address("slurm", **env)) == "10.0.0.4:1234"
    assert str(address("mpi", comm=Comm(["other"]), **env)) == "10.0.0.4:1234"


def test_slurm_names_host_and_port():
    env = {"SLURM_JOB_NODELIST_HET_GROUP_0": "nv[1-2]", "SLURM_JOB_NODELIST": "amd1,nv[1-2]", "SLURM_HET_JOB_ID": "8",
           "SLURM_JOB_ID": "9"}
    found = address("slurm", **env)
    assert (found.host, found.port, found.origin) == ("nv1", 12008, "Slurm's node list")


def test_it_is_left_in_the_environment():
    env = {}
    find_address(Launch(0, 2, 0, "torchrun"), None, None, env)
    assert env == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_mpi_broadcasts_a_free_port_and_the_address_of_rank_0():
    here = socket.gethostname()
    one = address("mpi", comm=Comm([here] * 4))
    assert one.host == "127.0.0.1" and 1024 < one.port < 65536 and "MPI" in one.origin
    several = address("mpi", comm=Comm([here, here, "elsewhere"]))
    socket.inet_aton(several.host)
    assert find_address(Launch(0, 4, 0, "mpi"), Comm([here, "elsewhere"]), "lo", {}).host == "127.0.0.1"
    assert address("mpi", comm=Comm([here]), MASTER_PORT="77").port == 77


def test_several_hosts_and_no_address_are_refused():
    with pytest.raises(WorldError, match=r"4 ranks on several hosts \(2 on this one\).*MASTER_ADDR.*mpi4py"):
        address("mpi", MPI_LOCALNRANKS="2")
    with pytest.raises(WorldError, match="MASTER_PORT='a port'"):
        address(MASTER_PORT="a port")
