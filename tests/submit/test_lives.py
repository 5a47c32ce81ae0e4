"""Lives of jobs on a real Slurm: time limits, preemption, failures, and what comes after."""

import os
import signal
import subprocess
import time

import pytest

from moedist.submit.follow import follow
from moedist.submit.queue import queued
from moedist.submit.submit import resize
from tests.launching import metrics
from tests.submit.cluster import numbers
from tests.submit.test_jobs import by_torchrun, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # bounds of their own: every wait has one

TWO = ["placement.counts=[5,3]", "placement.batch_shares=[5,3]", "train.schedule=constant"]


def test_time_limit_saves_comes_back_and_equals_an_uninterrupted_run(slurm):
    profile = slurm.profile("limit", nvidia="nodes: 1", amd="nodes: 1", signal_s=120)
    folder = slurm.submit(profile, *TWO, "phases=[{train: 5000}]", "world.slowdown={0: [1, 1], 3: [10, 10]}")
    slurm.wait_for_step(folder, 3)
    run_for = subprocess.run(["squeue", "-h", "-j", folder.read().numbers[0], "-o", "%M"], capture_output=True, text=True)
    # Slurm's own limit, brought near: it sends the signal by itself
    minutes = int(run_for.stdout.split()[0].split(":")[0]) + 2
    for number in numbers(folder):
        subprocess.run(["scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}"], check=True)
    slurm.wait_for_requeue(folder)
    member, = folder.members()
    life, = member.lives()
    assert life["outcome"] == "stopped" and life["code"] == 0, slurm.said(folder)
    stopped = life["step"]
    assert member.run().steps()[-1] == stopped
    for number in numbers(folder):
        subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=10"], check=True)
    slurm.release(folder)
    slurm.wait_for_step(folder, stopped + 5)
    assert "goes on with" in (folder.path / f"slurm-{numbers(folder)[0]}.log").read_text()
    subprocess.run(["scancel", folder.read().numbers[0]], check=True)  # behind moedist's back
    slurm.wait_until_ended(folder, "CANCELLED")
    assert "not by moedist cancel: by scancel or by the site" in member.lives()[-1]["why"]
    expected = by_torchrun(slurm, 2, [*TWO, f"phases=[{{train: {stopped + 5}}}]"])
    found = losses(folder)
    assert all(abs(found[step] - loss) < 1e-12 for step, loss in expected.items())


def test_preempted_job_goes_on_with_one_node_fewer(slurm):
    profile = slurm.profile("preempted", nvidia="nodes: 1", amd="nodes: 2, min_nodes: 1")
    folder = slurm.submit(profile, "phases=[{train: 200}]", "placement.probe_s=0.2",
                          "world.slowdown={0: [1, 1, 1], 3: [10, 10, 10]}")
    slurm.wait_for_step(folder, 3)
    with slurm.taken("amd1", "urgent") as urgent:
        slurm.wait_for_requeue(folder)
        slurm.wait_until_over(folder)
        member, = folder.members()
        assert [life["outcome"] for life in member.lives()] == ["preempted"], slurm.said(folder)
        before = member.run().steps()[-1]
        slurm.wait("the urgent job runs", lambda: queued()[urgent].state == "RUNNING", folder)
        follow([member], resize, patience_s=0)  # on as many nodes as are idle: amd1 is taken
        slurm.wait_until_ended(folder)
    log = member.log(1).read_text()
    assert f"resuming after step {before}" in log and "2 rank(s) by slurm" in log
    assert "done: 200 steps" in log
    run = member.run()
    plans = [line.split('"step":')[1].split(",")[0] for line in run.plans_file.read_text().splitlines()]
    assert str(before) in plans  # planned anew for the ranks that came back
    assert sorted(metrics(run.path)) == list(range(1, 201))


def test_crashed_node_is_survived(slurm):
    profile = slurm.profile("crash", nvidia="nodes: 1", amd="nodes: 1")
    folder = slurm.submit(profile, *TWO, "phases=[{train: 60}]", "checkpoint.every=5",
                          "world.slowdown={0: [1, 1], 3: [10, 10], 30: [1, 1]}")
    slurm.wait_for_step(folder, 11)
    member, = folder.members()
    node = next(node for node in ("amd1", "amd2") if slurm.pids_of_ranks(node))
    slurm.devcluster("crash", node)
    try:
        slurm.wait_for_requeue(folder)
        slurm.release(folder)
        slurm.wait_until_ended(folder)
    finally:
        slurm.devcluster("boot", node)
    assert "resuming after step" in member.log(1).read_text()
    assert sorted(losses(folder)) == list(range(1, 61))


def test_killed_rank_ends_the_job_with_its_name(slurm):
    profile = slurm.profile("killed", nvidia="nodes: 2", max_restarts=0)
    folder = slurm.submit(profile, *TWO, "phases=[{train: 5000}]")
    slurm.wait_for_step(folder, 2)
    pid, = slurm.pids_of_ranks("nvidia2")
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    slurm.wait_until_ended(folder, "GIVEN UP")
    assert time.monotonic() - killed < 30
    life, = folder.members()[0].lives()
    assert f"lost rank 1 on nvidia2 (process {pid})" in life["why"] and "max_restarts is 0" in life["why"]


def test_job_that_fails_twice_at_one_step_is_given_up(slurm):
    """A text that cannot be found on the nodes: /tmp is each node's own."""
    profile = slurm.profile("twice", amd="nodes: 1")
    folder = slurm.submit(profile, "placement.planner=equal", "data.source=files", "data.path=/tmp/not-there")
    slurm.wait_for_requeue(folder)
    slurm.release(folder)
    slurm.wait_until_ended(folder, "GIVEN UP")
    lives = folder.members()[0].lives()
    assert [life["outcome"] for life in lives] == ["failed", "given up"]
    assert "where it had failed before" in lives[1]["why"] and "/tmp/not-there" in lives[1]["why"]
    assert "moedist: given up" in next(folder.path.glob("slurm-*.log")).read_text()
