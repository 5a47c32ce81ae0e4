"""Node lists and ports from Slurm's variables."""

import doctest

import pytest

from moedist.errors import WorldError
from moedist.rendezvous import slurm
from moedist.rendezvous.slurm import expand_nodes, first_node, job_port


def test_doctests():
    assert doctest.testmod(slurm).failed == 0


@pytest.mark.parametrize("text, hosts", [
    ("n1", ["n1"]),
    ("n1,n2", ["n1", "n2"]),
    ("gpu-a100-[07-10]", ["gpu-a100-07", "gpu-a100-08", "gpu-a100-09", "gpu-a100-10"]),
    ("amd[1,3-4],nv1,big[099-101].site.org", ["amd1", "amd3", "amd4", "nv1", "big099.site.org", "big100.site.org",
                                              "big101.site.org"]),
    ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
    ("tux[8-11]", ["tux8", "tux9", "tux10", "tux11"]),
])
def test_node_lists(text, hosts):
    assert expand_nodes(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n[1-2", "n[]"])
def test_broken_node_lists_are_refused(text):
    with pytest.raises(WorldError, match="MASTER_ADDR"):
        expand_nodes(text)


def test_rank_0_of_a_heterogeneous_job_is_on_its_first_component():
    """The job's own list is the sorted union: amd1 is first there although rank 0 is on nv1."""
    env = {"SLURM_JOB_NODELIST": "amd[1-2],nv1", "SLURM_JOB_NODELIST_HET_GROUP_0": "nv1",
           "SLURM_JOB_NODELIST_HET_GROUP_1": "amd[1-2]"}
    assert first_node(env) == "nv1"


def test_a_step_on_some_of_the_nodes():
    assert first_node({"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[3-4]"}) == "n3"
    assert first_node({"SLURM_NODELIST": "n[2-4]"}) == "n2" and first_node({}) is None


def test_components_of_a_job_have_one_port_and_jobs_and_steps_their_own():
    first = {"SLURM_HET_JOB_ID": "100", "SLURM_JOB_ID": "100", "SLURM_STEP_ID": "0"}
    second = {"SLURM_HET_JOB_ID": "100", "SLURM_JOB_ID": "101", "SLURM_STEP_ID": "3"}
    assert job_port(first) == job_port(second)
    ports = {job_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in (100, 200) for step in (0, 1)}
    assert len(ports) == 4 and all(1024 < port < 32768 for port in ports)
    assert job_port({"SLURM_JOB_ID": "4294967295", "SLURM_STEP_ID": "extern"}) < 32768 and job_port({}) is None
