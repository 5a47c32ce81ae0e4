"""Jobs on a real Slurm of four nodes: every form trains as torchrun does, and says where ranks are."""

import json
import subprocess
import sys

import pytest

from moedist.submit.submit import run_here
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.ranks import mpirun
from tests.submit.cluster import ROOT, step_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # bounds of their own: every wait has one

SIX = ["placement.counts=[2,2,1,1,1,1]", "placement.batch_shares=[2,2,2,2,1,3]", "train.batch=12", "phases=[{train: 20}]"]
THREE = ["placement.counts=[4,2,2]", "placement.batch_shares=[2,1,1]", "phases=[{train: 6}]"]
ONE = ["placement.planner=equal", "phases=[{train: 3}]"]


def losses(folder, index=0):
    return metrics(folder.members()[index].run().path)


def by_torchrun(slurm, ranks, overrides):
    """The losses of the same run, started by torchrun's variables on this machine."""
    folder = slurm.shared / f"torchrun-{ranks}-{len(list(slurm.shared.iterdir()))}"
    arguments = ["train", *QUICKSTART[:1], *slurm.request(slurm.shared / "any.yaml", *overrides).overrides, f"folder={folder}"]
    moedist(ranks, slurm.shared / "cache", *arguments)
    return metrics(only_run(folder))


@pytest.fixture(scope="module")
def six_by_torchrun(started_cluster):
    return by_torchrun(started_cluster, 6, SIX)


@pytest.mark.parametrize("amd_first", [False, True], ids=["nvidia first", "amd first"])
def test_heterogeneous_job_equals_torchrun(slurm, six_by_torchrun, amd_first):
    profile = slurm.profile(f"het-{amd_first}", nvidia="nodes: 2, tasks_per_node: 2", amd="nodes: 2", amd_first=amd_first)
    folder = slurm.submit(profile, *SIX)
    slurm.wait_until_ended(folder)
    member = folder.members()[0]
    found = losses(folder)
    assert found.keys() == six_by_torchrun.keys() == set(range(1, 21))
    assert all(abs(found[step] - loss) < 1e-12 for step, loss in six_by_torchrun.items()), slurm.said(folder)
    assert "6 rank(s) by slurm" in member.log(0).read_text()
    order = ["amd1", "amd2", "nvidia1", "nvidia1", "nvidia2", "nvidia2"]
    hosts = [member.log(0, rank).read_text().split("hostname=")[1].split(",")[0] for rank in range(6)]
    assert hosts == (order if amd_first else order[2:] + order[:2])
    first = next(line for line in member.log(0).read_text().splitlines() if line.startswith("first step"))
    assert all(part in first for part in ("in the queue", "imports", "until ranks had met", "for the step")), first
    print(first)


def test_one_partition_with_both_kinds(slurm):
    """Three ranks on two nodes of one job, uneven, each kind with an environment of its own."""
    profile = slurm.profile("constraint", nvidia="nodes: 1, tasks_per_node: 2", amd="nodes: 1", form="constraint",
                            partition="mixed")
    folder = slurm.submit(profile, *THREE, "seed=3")
    slurm.wait_until_ended(folder)
    member = folder.members()[0]
    kinds = dict(line.split() for line in member.kinds_file.read_text().splitlines())
    assert sorted(kinds.values()) == ["amd", "nvidia"] and all(node.startswith(kind) for node, kind in kinds.items())
    assert "3 rank(s) by slurm" in member.log(0).read_text()
    expected = by_torchrun(slurm, 3, [*THREE, "seed=3"])
    assert losses(folder) == pytest.approx(expected, abs=1e-12)


def test_sweep_is_an_array(slurm):
    profile = slurm.profile("sweep", nvidia="nodes: 1")
    folder = slurm.submit(profile, *ONE, each=[["seed=1"], ["seed=2", "train.lr=1e-3"]])
    for i in range(2):
        slurm.wait_until_ended(folder, index=i)
    runs = [member.run() for member in folder.members()]
    assert [run.config().seed for run in runs] == [1, 2] and runs[1].config().train.lr == 1e-3
    assert {run.config().monitor.group for run in runs} == {folder.path.name}
    assert folder.read().array and len(folder.read().numbers) == 1
    assert all(step_of(member) == 3 for member in folder.members())


def test_the_same_here(slurm, capfd):
    """By submitit's local executor, and rank 0's log is shown."""
    profile = slurm.profile("local", nvidia="nodes: 1", amd="nodes: 1")
    assert run_here(slurm.request(profile, "placement.planner=equal", "phases=[{train: 3}]")) == 0
    shown = capfd.readouterr().out
    assert "2 rank(s) by torchrun" in shown and "done: 3 steps" in shown


def test_command_line_follows_and_lists(slurm):
    """moedist submit --follow, then moedist jobs."""
    profile = slurm.profile("shown", amd="nodes: 1")
    request = slurm.request(profile, *ONE)
    command = [sys.executable, ROOT / "launch/submit.py", request.config, *request.overrides, "--cluster", profile, "--follow"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step      3/3" in done.stdout and "moedist: done: trained to step 3" in done.stdout
    listed = subprocess.run([sys.executable, "-m", "moedist", "jobs", "--folder", slurm.shared / "shown"], capture_output=True,
                            text=True, timeout=60).stdout
    assert "DONE" in listed and "1x1 amd" in listed and "amd" in listed.splitlines()[1].split()[-1]
    run = json.loads((only_job(slurm.shared / "shown") / "job.json").read_text())
    assert run["numbers"][0] in listed


def only_job(runs):
    (job,) = (runs / "jobs").iterdir()
    return job


@pytest.mark.parametrize("amd_first", [False, True], ids=["nvidia first", "amd first"])
def test_mpi_over_both_kinds(slurm, amd_first):
    """Uneven ranks per node, where MPICH waits for ever on Slurm's process map unless it is told not to look at it."""
    mpirun(2)  # skips where there is no MPI
    profile = slurm.profile(f"mpi-{amd_first}", nvidia="nodes: 1, tasks_per_node: 2", amd="nodes: 1", amd_first=amd_first,
                            mpi="pmi2")
    folder = slurm.submit(profile, *THREE, "seed=4", "world.transport=mpi")
    slurm.wait_until_ended(folder)
    assert "rows travel by mpi" in folder.members()[0].log(0).read_text()
    assert losses(folder) == pytest.approx(by_torchrun(slurm, 3, [*THREE, "seed=4"]), abs=1e-12)
