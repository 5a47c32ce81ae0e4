"""Jobs on a real Slurm of four nodes: every form trains as torchrun does, and says where ranks are."""

import subprocess
import sys

import pytest

from moedist.errors import ConfigError
from moedist.submit.job_folder import JobFolder
from moedist.submit.listing import cancel, show_jobs
from moedist.submit.submit import resize, run_here
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


@pytest.fixture(scope="module")
def three_by_torchrun(started_cluster):
    return by_torchrun(started_cluster, 3, THREE)


@pytest.mark.parametrize("amd_first", [False, True], ids=["nvidia first", "amd first"])
def test_heterogeneous_job_equals_torchrun(slurm, six_by_torchrun, amd_first):
    profile = slurm.profile(f"het-{amd_first}", nvidia="nodes: 2, tasks_per_node: 2, setup: [hostname]",
                            amd="nodes: 2, setup: [hostname]", amd_first=amd_first)
    folder = slurm.submit(profile, *SIX)
    slurm.wait_until_ended(folder)
    member = folder.members()[0]
    found = losses(folder)
    assert found.keys() == six_by_torchrun.keys() == set(range(1, 21))
    assert all(abs(found[step] - loss) < 1e-12 for step, loss in six_by_torchrun.items()), slurm.said(folder)
    assert "6 rank(s) by slurm" in member.log(0).read_text()
    order = ["amd1", "amd2", "nvidia1", "nvidia1", "nvidia2", "nvidia2"]
    logs = [member.log(0, rank).read_text() for rank in range(6)]
    assert [log.splitlines()[0] for log in logs] == (order if amd_first else order[2:] + order[:2])
    assert not any(word in log for log in logs for word in ("submitit INFO", "[c10d]")), logs
    first = next(line for line in member.log(0).read_text().splitlines() if line.startswith("first step"))
    assert all(part in first for part in ("in the queue", "imports", "until ranks had met", "for the step")), first
    print(first)


def test_one_partition_with_both_kinds(slurm, three_by_torchrun):
    """Three ranks on two nodes of one job, uneven, each kind with an environment of its own."""
    profile = slurm.profile("constraint", nvidia="nodes: 1, tasks_per_node: 2", amd="nodes: 1", form="constraint",
                            partition="mixed")
    folder = slurm.submit(profile, *THREE)
    slurm.wait_until_ended(folder)
    member = folder.members()[0]
    kinds = dict(line.split() for line in member.kinds_file.read_text().splitlines())
    assert sorted(kinds.values()) == ["amd", "nvidia"] and all(node.startswith(kind) for node, kind in kinds.items())
    assert "3 rank(s) by slurm" in member.log(0).read_text()
    assert losses(folder) == pytest.approx(three_by_torchrun, abs=1e-12)


def test_sweep_is_an_array_and_the_command_line_follows_it(slurm):
    """moedist submit --each ... --follow, then moedist jobs. Its nodes may be fewer than it wants, and one of two is taken."""
    profile = slurm.profile("sweep", amd="nodes: 2, min_nodes: 1")
    request, runs = slurm.request(profile, *ONE), slurm.shared / "sweep"
    command = [sys.executable, ROOT / "launch/submit.py", request.config, *request.overrides, "--cluster", profile, "--follow",
               "--each", "seed=1", "--each", "seed=2 train.lr=1e-3"]
    with slurm.taken("amd1"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = JobFolder(only_job(runs))
    assert folder.read().array and len(folder.read().numbers) == 1
    number = folder.read().numbers[0]
    for i, own in enumerate(("seed=1", "seed=2 train.lr=1e-3")):
        assert f"  {folder.path.name}/{i} (job {number}_{i}): {own}\n" in done.stdout
        assert f"[{i}] -- done (job {number}_{i})" in done.stdout
        assert f"[{i}] moedist: done: trained to step 3" in done.stdout
        assert any(line.startswith(f"[{i}] step      3/3") for line in done.stdout.splitlines()), done.stdout
    configs = [member.run().config() for member in folder.members()]
    assert [config.seed for config in configs] == [1, 2] and configs[1].train.lr == 1e-3
    assert {config.monitor.group for config in configs} == {folder.path.name}
    assert [(step_of(member), member.lives()[0]["nodes"]) for member in folder.members()] == [(3, "amd2"), (3, "amd2")]
    listed = show_jobs(runs).splitlines()
    assert len(listed) == 5
    assert all("DONE" in line and "2x1 amd" in line and line.endswith("amd2") for line in listed[1:3]), listed
    one = show_jobs(runs, [f"{folder.path.name}/1"])
    assert f"{number}_1" in one and f"{number}_0" not in one
    assert show_jobs(runs, [f"{number}_1"]) == one and show_jobs(runs, [number]) == show_jobs(runs)
    with pytest.raises(ConfigError, match="has 2 trainings, counted from 0; there is no 2"):
        show_jobs(runs, [f"{folder.path.name}/2"])


def test_sweep_of_heterogeneous_jobs_and_one_of_it_by_itself(slurm):
    """A job each; one is cancelled and goes on, on nodes of one kind, the other does not notice."""
    profile = slurm.profile("het-sweep", nvidia="nodes: 1", amd="nodes: 1")
    long = ["seed=2", "phases=[{train: 150}]", "world.slowdown={0: [1, 1], 3: [10, 10]}"]
    folder = slurm.submit(profile, "placement.planner=equal", each=[["seed=1", "phases=[{train: 3}]"], long])
    first, second = folder.members()
    job = folder.read()
    assert job.form == "hetjob" and not job.array and len(set(job.numbers)) == 2
    following = subprocess.Popen([sys.executable, "-m", "moedist", "jobs", folder.path, "--follow"], stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True)
    slurm.wait_for_step(folder, 4, index=1)
    said = cancel(f"{folder.path}/1")
    assert said.startswith(f"cancelled: {second.label} (job {job.numbers[1]}), which runs: its ranks save a checkpoint first")
    assert "it has no checkpoint, and would start at step 0" in said and f"to go on: moedist resize {second.label}" in said
    slurm.wait_until_ended(folder, "CANCELLED", index=1)
    slurm.wait_until_ended(folder, index=0)
    shown, _ = following.communicate(timeout=60)
    assert following.returncode == 1, shown  # not all of it was done
    for line in ("[0] moedist: done: trained to step 3", "[1] moedist: cancelled: cancelled after step",
                 f"[0] -- done (job {job.numbers[0]})", f"[1] -- cancelled (job {job.numbers[1]})"):
        assert line in shown, shown
    saved = second.checkpoint()
    assert saved >= 4 and f"its newest checkpoint is of step {saved}" in cancel(str(second.path))
    row = show_jobs(slurm.shared / "het-sweep", [second.label]).splitlines()[1].split()
    assert row[0] == second.label and str(saved) in row and "CANCELLED" in row
    configs = [member.run().config() for member in folder.members()]
    assert [config.seed for config in configs] == [1, 2]
    assert {config.monitor.group for config in configs} == {folder.path.name}
    with pytest.raises(ConfigError, match="is done: it has trained to its end"):
        resize(first)
    resize(second, {"amd": 0}, time_limit="5:00")
    assert second.number not in job.numbers and first.number == job.numbers[0]
    slurm.wait_until_ended(folder, index=1)
    assert f"resuming after step {saved}" in second.log(1).read_text() and "1 rank(s) by slurm" in second.log(1).read_text()
    assert sorted(metrics(second.run().path)) == list(range(1, 151))
    assert "--time=5:00" in second.folder.script.read_text() and second.folder.read().kinds == ["1x1 nvidia"]


def test_the_same_here(slurm, capfd):
    """By submitit's local executor, and rank 0's log is shown."""
    profile = slurm.profile("local", nvidia="nodes: 1", amd="nodes: 1")
    assert run_here(slurm.request(profile, "placement.planner=equal", "phases=[{train: 3}]")) == 0
    shown = capfd.readouterr().out
    assert "2 rank(s) by torchrun" in shown and "done: 3 steps" in shown


def only_job(runs):
    (job,) = (runs / "jobs").iterdir()
    return job


def test_mpi_over_both_kinds(slurm, three_by_torchrun):
    """Uneven ranks per node, the first kind's nodes not first by name: MPICH waits for ever on Slurm's process map, unless it
    is told not to look at it."""
    mpirun(2)  # skips where there is no MPI
    profile = slurm.profile("mpi", nvidia="nodes: 1, tasks_per_node: 2", amd="nodes: 1", mpi="pmi2")
    folder = slurm.submit(profile, *THREE, "world.transport=mpi")
    slurm.wait_until_ended(folder)
    assert "rows travel by mpi" in folder.members()[0].log(0).read_text()
    assert losses(folder) == pytest.approx(three_by_torchrun, abs=1e-12)
