"""The lives of a job: what is done before the ranks of one start, and after they have ended. Called by the batch script.

A life ends by itself (done), by a signal ahead of the time limit or of a preemption (stopped: the ranks have saved), or by a
failure. Slurm itself brings a job back after a preemption or a failed node. What it does not, this does: after its time limit
and after a failure the job is requeued, as often as the profile allows, and as long as it gets on: a job that fails, or
reaches its limit, where the life before it did is given up.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from typing import Any, Mapping, Sequence

from moedist.errors import MoedistError
from moedist.rendezvous.slurm import expand_nodes
from moedist.submit.job_folder import Job, Member
from moedist.submit.profile import NodeKind, Profile, read_profile
from moedist.submit.queue import ask_slurm

GIVEN_UP = 3  # exit code of the batch script
SHOW = ("scontrol", "--oneliner", "show", "job")  # sacct would need an accounting database
STATE = ("squeue", "-h", "-t", "all", "-o", "%T %r", "-j")


def decide(job: Job, lives: Sequence[Mapping[str, Any]], restarts: int, told: str, finished: bool, code: int,
           step: int) -> tuple[str, str, bool]:
    """What has become of a life, and whether the job is to be requeued.

    Args:
        lives: that ended before, see `Member.lives`.
        restarts: of the job until now.
        told: why Slurm ends the job: preempted or requeued (it has put it back into the queue itself), cancelled (by moedist
            cancel), ended (by scancel, or by a site that cancels what it preempts: it does not come back), limit (the time
            limit, where the signal ahead of it came too late or ranks took too long), or empty: it does not.
        finished: whether training is done.
        code: exit code of srun; step: the last that was logged, 0: none.

    Returns:
        Outcome (done, preempted, requeued, cancelled, stopped, failed or given up), why, and whether to requeue.
    """
    if code == 0 and finished:
        return "done", "the check has ended" if job.check else f"trained to step {step}", False
    if told in ("preempted", "requeued", "cancelled"):
        return told, f"{told} after step {step}", False
    if told == "ended":
        return "cancelled", f"cancelled after step {step}, not by moedist cancel: by scancel or by the site", False
    what = f"stopped by a signal after step {step}" if code == 0 else f"failed after step {step} (exit code {code})"
    if told == "limit":
        what = f"reached its time limit after step {step}"
    before = next((life for life in reversed(lives) if life["outcome"] in ("stopped", "failed")), None)
    if not job.requeue:
        return "given up", f"{what}; the profile says requeue: false", False
    if before is not None and before["step"] == step:
        return "given up", f"{what}, where it had {before['outcome']} before: it would not get on; see the logs of both", False
    if restarts >= job.max_restarts:
        return "given up", f"{what}, after {restarts} restarts; max_restarts is {job.max_restarts}", False
    return ("stopped" if code == 0 or told else "failed"), f"{what}; requeued", True


def start(member: Member, env: Mapping[str, str] = os.environ) -> list[str]:
    """Shell lines for the batch script: which run to go on with, which life this is, and where ranks are to be."""
    member.logs.mkdir(parents=True, exist_ok=True)
    # not by Slurm's count of restarts: a job that was resized has another number
    life = 1 + max((int(log.name.split("-")[0]) for log in member.logs.glob("*-*.log")), default=-1)
    if life and all(other["life"] != life - 1 for other in member.lives()):  # its batch script did not outlive it
        member.add_life({"life": life - 1, "number": env.get("SLURM_JOB_ID", ""), "outcome": "lost",
                         "step": int(member.last_metrics().get("step", 0)), "code": None, "why": "a node failed, or Slurm "
                         "killed the job", "nodes": "", "ended": time.time()})
    lines = [f"export MOEDIST_LIFE={life}", f"export MOEDIST_STARTED={time.time():.3f}"]
    member.done_file.unlink(missing_ok=True)
    run = member.run()
    resumed = run is not None and bool(run.steps())
    lines.append(f"export MOEDIST_RESUME={shlex.quote(str(run) if resumed else '')}")
    job = member.folder.read()
    if job.form == "constraint":
        profile = read_profile(member.folder.profile)
        nodes = expand_nodes(env["SLURM_JOB_NODELIST"])
        features = dict(line.split() for line in ask_slurm("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %f"))
        kinds = kinds_of_nodes(profile, nodes, features)
        member.kinds_file.write_text("".join(f"{node} {kind.name}\n" for node, kind in kinds))
        member.hosts_file.write_text("".join(f"{node}\n" * kind.tasks_per_node for node, kind in kinds))
        first = kinds[0][0]
        lines.append(f"export SLURM_HOSTFILE={shlex.quote(str(member.hosts_file))} MASTER_ADDR={first}")
    print(f"life {life} on {nodes_of(env)}: "
          + (f"goes on with {run}, step {run.steps()[-1]}" if resumed else "starts afresh"), file=sys.stderr)
    return lines


def nodes_of(env: Mapping[str, str]) -> str:
    """The nodes of a job, of all its components, as Slurm writes them.

    >>> nodes_of({"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "b1", "SLURM_JOB_NODELIST_HET_GROUP_1": "a[1-2]"})
    'b1,a[1-2]'
    """
    size = int(env.get("SLURM_HET_SIZE") or 0)
    parts = [env.get(f"SLURM_JOB_NODELIST_HET_GROUP_{i}") for i in range(size)] or [env.get("SLURM_JOB_NODELIST")]
    return ",".join(filter(None, parts))


def kinds_of_nodes(profile: Profile, nodes: Sequence[str], features: Mapping[str, str]) -> list[tuple[str, NodeKind]]:
    """Each node with its kind, in the order of kinds; a node that has the features of several is of the first with room.

    Args:
        features: of each node, with commas between.

    Raises:
        MoedistError: a node has the feature of no kind.
    """
    found: dict[str, list[str]] = {kind.name: [] for kind in profile.kinds}
    for node in nodes:
        fitting = [k for k in profile.kinds if k.constraint in features.get(node, "").split(",")]
        if not fitting:
            raise MoedistError(f"node {node} has the features {features.get(node, 'none')!r}, of no kind of the profile")
        room = [kind for kind in fitting if len(found[kind.name]) < kind.nodes]
        found[(room or fitting)[0].name].append(node)
    return [(node, kind) for kind in profile.kinds for node in found[kind.name]]


def end(member: Member, code: int, env: Mapping[str, str] = os.environ) -> int:
    """Write down what has become of a life, and requeue the job or not.

    Returns:
        The exit code of the batch script: 0 where training is done or goes on, or Slurm's word stands.
    """
    job, number = member.folder.read(), env["SLURM_JOB_ID"]
    step = int(member.last_metrics().get("step", 0))
    restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
    told = ""
    if env.get("MOEDIST_TOLD_TO_END"):
        said = [log.read_text(encoding="utf-8", errors="replace") for log in member.batch_logs()[-1:]]
        shown, queue = (ask_slurm(*command, number) for command in (SHOW, STATE))
        told = why_told(shown + queue, restarts, "".join(said).rpartition("\nlife ")[2])
    if member.cancelled.exists():
        told = "cancelled"
    outcome, why, again = decide(job, member.lives(), restarts, told, member.done_file.exists(), code, step)
    life = int(env.get("MOEDIST_LIFE", 0))
    if code and not told and (error := member.error_of(life)):
        why += f": {error}"
    member.add_life({"life": life, "number": number, "outcome": outcome, "step": step, "code": code,
                     "why": why, "nodes": nodes_of(env), "ended": time.time()})
    print(f"moedist: {outcome}: {why}", flush=True)
    if again:
        done = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True, check=False)
        if done.returncode:  # such as a job that Slurm has put back by itself
            print(f"moedist: scontrol requeue {number}: {done.stderr.strip()}", flush=True)
    return {"given up": code or GIVEN_UP, "failed": code}.get(outcome, 0)


def why_told(slurm: Sequence[str], restarts: int, said: str) -> str:
    """Why Slurm ends a job that has got SIGTERM; see `decide`.

    Args:
        slurm: lines of scontrol and squeue about the job, while its batch script still runs.
        restarts: of the job until this life began; Slurm counts the next one as soon as it puts the job back into the queue.
        said: by the batch script in this life, Slurm's own words included.
    """
    text = "\n".join(slurm)
    if "TIMEOUT" in text or "TimeLimit" in text.split():
        return "limit"
    if any(int(count) > restarts for count in re.findall(r"\bRestarts=(\d+)", text)):
        return "requeued" if "DUE TO JOB REQUEUE" in said else "preempted"
    return "ended"


def main(arguments: Sequence[str]) -> int:
    """`start JOB` or `end JOB CODE`."""
    try:
        if arguments[0] == "start":
            print("\n".join(start(Member(arguments[1]))))
            return 0
        return end(Member(arguments[1]), int(arguments[2]))
    except MoedistError as error:
        print(f"moedist: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
