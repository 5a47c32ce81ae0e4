"""What becomes of a life of a job, as a function of how it ended."""

import pytest

from moedist.submit.job_folder import Job
from moedist.submit.life import decide, kinds_of_nodes, why_told
from moedist.submit.profile import NodeKind, Profile
from moedist.submit.queue import numbers_of

JOB = Job("x", [], "job", 2, [[]], 0.0, requeue=True, max_restarts=3)


def lives(*entries):
    return [{"outcome": outcome, "step": step} for outcome, step in entries]


@pytest.mark.parametrize("before, restarts, told, finished, code, step, outcome, again", [
    ([], 0, "", True, 0, 20, "done", False),
    ([], 0, "", False, 0, 7, "stopped", True),  # the signal ahead of the limit
    ([], 0, "limit", False, 0, 7, "stopped", True),  # the limit itself
    ([], 0, "preempted", False, 0, 7, "preempted", False),  # Slurm brings it back
    ([], 0, "requeued", False, 0, 7, "requeued", False),
    ([], 0, "cancelled", False, 143, 7, "cancelled", False),
    ([], 0, "ended", False, 0, 7, "cancelled", False),
    ([], 0, "", False, 1, 7, "failed", True),
    (lives(("failed", 7)), 1, "", False, 1, 7, "given up", False),
    (lives(("failed", 7), ("preempted", 7)), 2, "", False, 1, 7, "given up", False),  # a preemption is no progress
    (lives(("stopped", 7)), 1, "", False, 0, 7, "given up", False),  # a limit that is too short to get on
    (lives(("failed", 7)), 1, "", False, 1, 8, "failed", True),
    (lives(("stopped", 5)), 3, "", False, 0, 9, "given up", False),  # often enough
    ([], 0, "", True, 1, 20, "failed", True),  # done, but what came after failed
])
def test_decide(before, restarts, told, finished, code, step, outcome, again):
    found, why, requeued = decide(JOB, before, restarts, told, finished, code, step)
    assert (found, requeued) == (outcome, again)
    assert str(step) in why


@pytest.mark.parametrize("slurm, said, told", [
    (["JobId=1 JobState=COMPLETING Restarts=2", "COMPLETING None"], "JOB 1 ON a CANCELLED AT 2026", "ended"),
    (["JobId=1 JobState=COMPLETING Restarts=3", "COMPLETING None"], "JOB 1 ON a CANCELLED DUE TO PREEMPTION", "preempted"),
    (["JobId=1 HetJobOffset=0 Restarts=3", "JobId=2 HetJobOffset=1 Restarts=3"], "", "preempted"),
    (["JobId=1 JobState=COMPLETING Restarts=3"], "JOB 1 ON a CANCELLED AT 2026 DUE TO JOB REQUEUE", "requeued"),
    (["JobId=1 JobState=COMPLETING Restarts=2", "TIMEOUT TimeLimit"], "", "limit"),
])
def test_why_slurm_ends_a_job_in_its_third_life(slurm, said, told):
    assert why_told(slurm, 2, said) == told


def test_a_check_says_so():
    job = Job("x", [], "job", 2, [[]], 0.0, requeue=False, max_restarts=3, check=True)
    assert decide(job, [], 0, "", True, 0, 0)[:2] == ("done", "the check has ended")


def test_no_requeue():
    job = Job("x", [], "job", 2, [[]], 0.0, requeue=False, max_restarts=3)
    outcome, why, again = decide(job, [], 0, "", False, 1, 4)
    assert outcome == "given up" and "requeue: false" in why and not again


def test_nodes_go_to_kinds_that_have_room():
    profile = Profile(kinds=[NodeKind(name="a", constraint="gpu", nodes=1), NodeKind(name="b", constraint="big", nodes=2)])
    features = {"n1": "gpu,big", "n2": "gpu,big", "n3": "big"}
    assert [(node, kind.name) for node, kind in kinds_of_nodes(profile, ["n1", "n2", "n3"], features)] == [
        ("n1", "a"), ("n2", "b"), ("n3", "b")]


def test_numbers_as_squeue_writes_them():
    assert numbers_of("7+1") == ["7"] and numbers_of("12_3") == ["12_3"] and numbers_of("9") == ["9"]
    assert numbers_of("12_[0-2,4%3]") == ["12_0", "12_1", "12_2", "12_4"]
