"""The Slurm that the tests submit to: slurm/devcluster, with two environments on a folder that all nodes see."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Callable, Iterator

import pytest

from moedist.submit.job_folder import JobFolder, Member
from moedist.submit.listing import ENDED, state_of
from moedist.submit.queue import queued
from moedist.submit.submit import Request, submit
from tests.launching import TINY

ROOT = Path(__file__).parents[2]
DEVCLUSTER = ROOT / "slurm" / "devcluster"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
NODES = ("nvidia1", "nvidia2", "amd1", "amd2")
LOOK_S = 2.0  # between questions to Slurm whether a job has ended
REVOKED_S = 2  # more than the second in which a life was ended
VENV = """import site; site.addsitedir({packages!r})
"""


def refused() -> str:
    """Why there can be no Slurm here; empty where there can."""
    if sys.platform != "linux" or os.geteuid():
        return "slurm/devcluster needs Linux and root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(missing)} here (apt-get install slurm-wlm munge iproute2)" if missing else ""


class Cluster:
    """Four nodes: nvidia1, nvidia2 with two ranks' worth of GPUs, amd1, amd2 with one."""

    def __init__(self) -> None:
        # not below /tmp, of which every node has its own; one a checkout, so that what a killed session left is found
        mark = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
        self.folder = Path(f"/var/tmp/moedist-tests-{mark}")
        self.shared = self.folder / "shared"
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "MOEDIST_CACHE": str(self.shared / "cache"),
                            "PYTHONPATH": str(ROOT)}

    def start(self) -> None:
        self._lock = open(f"{self.folder}.lock", "w", encoding="utf-8")  # another session of this checkout: wait for its end
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with suppress(RuntimeError):
            self.devcluster("stop")
        self.devcluster("start", "nvidia=2x2", "amd=2x1", "--share", str(ROOT), "--share", sys.prefix)
        (self.shared / "cache").mkdir()
        for kind in ("nvidia", "amd"):
            venv = self.shared / f"venv-{kind}"
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
            (folder,) = venv.glob("lib/python*/site-packages")
            for library in Path(sys.prefix, "lib").glob("*mpi*"):  # where mpi4py looks for MPICH, and MPICH for its own
                (venv / "lib" / library.name).symlink_to(library)
            (folder / "tests.pth").write_text("".join(VENV.format(packages=path) for path in site.getsitepackages()))

    def stop(self) -> None:
        self.devcluster("stop")
        self._lock.close()

    def devcluster(self, *arguments: str) -> None:
        done = subprocess.run([DEVCLUSTER, "--folder", self.folder, *arguments], capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"devcluster {' '.join(arguments)}: {done.stdout}{done.stderr}")

    # -- jobs

    def profile(self, name: str, nvidia: str = "", amd: str = "", **keys: object) -> Path:
        """A profile with the kinds that have keys, such as 'nodes: 2, tasks_per_node: 1'; the first given comes first."""
        kinds = [(kind, own) for kind, own in (("nvidia", nvidia), ("amd", amd)) if own]
        if keys.pop("amd_first", False):
            kinds.reverse()
        lines = ["kinds:"]
        for kind, own in kinds:
            partition = keys.get("partition", kind)
            gres = "" if keys.get("form") == "constraint" else f'gres: "gpu:{kind}:1", '
            venv = "" if "venv:" in own else f"venv: {self.shared}/venv-{kind}, "
            lines.append(f"  - {{name: {kind}, partition: {partition}, {gres}cpus_per_task: 1, memory: 1G, "
                         f"constraint: {kind}, {venv}{own}}}")
        keys.pop("partition", None)
        lines += [f"{key}: {value}" for key, value in {"time": '"10:00"', "signal_s": 60, **keys}.items()]
        path = self.shared / f"{name}.yaml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def request(self, profile: Path, *overrides: str, **more: object) -> Request:
        """A tiny training in float64, in a folder of runs of the profile's name."""
        return Request(str(ROOT / "configs/quickstart.yaml"), [*TINY, "train.dtype=float64", *overrides,
                                                               f"folder={self.shared}/{profile.stem}"], str(profile), **more)

    def submit(self, profile: Path, *overrides: str, **more: object) -> JobFolder:
        return submit(self.request(profile, *overrides, **more))

    def state(self, folder: JobFolder, index: int = 0) -> str:
        return state_of(folder.members()[index], queued())

    def wait(self, what: str, done: Callable[[], object], folder: JobFolder, timeout: float = 240,
             index: int | None = None) -> None:
        """Until `done`; fails with all that is known of the job, at once where the training of `index` ends before."""
        deadline, looked = time.monotonic() + timeout, time.monotonic()
        while not done():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout:g} s: {what}\n{self.said(folder)}")
            if index is not None and time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if (state := self.state(folder, index)) in ENDED and not done():
                    pytest.fail(f"{state} before: {what}\n{self.said(folder)}")
            time.sleep(0.2)

    def wait_for_step(self, folder: JobFolder, step: int, index: int = 0) -> None:
        self.wait(f"step {step}", lambda: step_of(folder.members()[index]) >= step, folder, index=index)

    def wait_until_ended(self, folder: JobFolder, state: str = "DONE", index: int = 0) -> None:
        self.wait(state, lambda: self.state(folder, index) in ENDED, folder)
        assert self.state(folder, index) == state, self.said(folder)

    def wait_for_requeue(self, folder: JobFolder) -> None:
        """Until Slurm has put a job back into the queue; it waits there before its first life as well."""
        def requeued() -> bool:
            components = shown(folder)
            return bool(components) and all(c["Restarts"] != "0" and c["JobState"] == "PENDING" for c in components)

        self.wait("requeued", requeued, folder, index=0)

    def release(self, folder: JobFolder) -> None:
        """Start a requeued job, which Slurm holds back for two minutes, as soon as it can.

        Not at once: a node refuses a job whose credential is of the second in which its last life was ended, or older, and
        Slurm then fails the job ("Killing non-startable batch job: Job credential revoked").
        """
        self.wait_until_over(folder)
        self.wait("waits", lambda: all(c["JobState"] == "PENDING" for c in shown(folder)), folder, index=0)
        self._start_soon(folder)

        def started() -> bool:
            if any(c["Reason"] == "BeginTime" and _seconds_until(c["StartTime"]) > 2 * REVOKED_S for c in shown(folder)):
                self._start_soon(folder)  # the last life ended only now, to Slurm
            return all(c["JobState"] != "PENDING" for c in shown(folder))

        self.wait("started again", started, folder, index=0)

    def _start_soon(self, folder: JobFolder) -> None:
        for number in numbers(folder):
            subprocess.run(["scontrol", "update", f"JobId={number}", f"StartTime=now+{REVOKED_S}"], check=True)

    def wait_until_over(self, folder: JobFolder) -> None:
        """Until nothing is left of the last life on any node."""
        self.wait("the last life is over", lambda: not any(self._steps(node) & set(numbers(folder)) for node in NODES), folder)

    @contextmanager
    def taken(self, node: str, partition: str = "mixed") -> Iterator[str]:
        """Another's job has a node for itself; its number."""
        command = ["sbatch", "--parsable", "-p", partition, "-w", node, "--exclusive", "-o", "/dev/null", "--wrap",
                   "sleep 600"]
        number = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        try:
            yield number
        finally:
            subprocess.run(["scancel", number], check=True)

    def said(self, folder: JobFolder) -> str:
        """All that is known of a job: its logs, and Slurm's view."""
        logs = [log for m in folder.members() for log in (*m.batch_logs(), *sorted(m.logs.glob("*-*.log")))]
        parts = [(str(log.relative_to(folder.path)), log.read_text(errors="replace")) for log in logs]
        for command in (["scontrol", "show", "job"], ["sinfo", "-N", "-l"], ["sinfo", "-R"]):
            parts.append((" ".join(command), subprocess.run(command, capture_output=True, text=True, check=False).stdout))
        parts.append(("slurmctld", (self.folder / "controller/log").read_text(errors="replace")))
        return "\n".join(f"== {name}\n{text[-3000:]}" for name, text in parts)

    def pids_of_ranks(self, node: str) -> list[int]:
        """Processes of training ranks on a node."""
        return [pid for pid, words in self._processes(node) if b"submitit.core._submit" in words and b"python" in words[0]]

    def _steps(self, node: str) -> set[str]:
        """Numbers of the jobs that have a step or batch script on a node: each has a process called slurmstepd: [7.batch]."""
        titles = [words[0].decode() for _, words in self._processes(node)]
        return {title.split("[")[1].split(".")[0] for title in titles if title.startswith("slurmstepd: [")}

    def _processes(self, node: str) -> list[tuple[int, list[bytes]]]:
        number = json.loads((self.folder / "state.json").read_text())["number"]
        command = ["ip", "netns", "pids", f"moedev{number}-{node}"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = []
        for pid in map(int, text.split()):
            with suppress(OSError):
                found.append((pid, Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")))
        return found


def numbers(folder: JobFolder) -> list[str]:
    """Slurm's numbers of a job's components."""
    job = folder.read()
    return [str(int(job.numbers[0]) + i) for i in range(len(job.kinds) if job.form == "hetjob" else 1)]


def shown(folder: JobFolder) -> list[dict[str, str]]:
    """What scontrol says of each component of a job, or of each element of an array."""
    command = ["scontrol", "--oneliner", "show", "job", numbers(folder)[0]]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [dict(word.partition("=")[::2] for word in line.split()) for line in text.splitlines()]


def _seconds_until(text: str) -> float:
    """From now until a time as scontrol writes it; 0 where it says Unknown: nothing is to be waited for."""
    return 0.0 if text == "Unknown" else (datetime.fromisoformat(text) - datetime.now()).total_seconds()


def step_of(member: Member) -> int:
    """The last step that a training has logged."""
    return int(member.last_metrics().get("step", 0))
