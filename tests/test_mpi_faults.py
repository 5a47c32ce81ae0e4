"""A rank fails under mpirun, by an error, a kill, or silence: all end within seconds, and one line names it."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from moedist.faults import is_alive
from tests.launching import (QUICKSTART, ROOT, environment, metrics, moedist, only_run, output_of, start_command,
                             wait_for_step)
from tests.ranks import mpirun
from tests.test_faults import COMMON, FAULT, MOST_S, ended, our_errors

MPI = [*COMMON, "world.transport=mpi", "checkpoint.every=0"]
RANK_VARIABLES = (b"PMI_RANK", b"OMPI_COMM_WORLD_RANK")


def ranks_of(mark: str) -> list[int]:
    """Process ids of the ranks that have this mark in their environment, in the order of ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
            if variables.get(b"MOEDIST_TEST") == mark.encode() and b"liveness" not in (folder / "cmdline").read_bytes():
                found |= {int(variables[name]): int(folder.name) for name in RANK_VARIABLES if name in variables}
        except (OSError, ValueError):  # it has ended
            pass
    return [found[rank] for rank in sorted(found)]


def start_by_mpirun(cache, ranks: int, *arguments: str, monkeypatch) -> tuple[subprocess.Popen, str]:
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MOEDIST_TEST", mark)
    return start_command([*mpirun(ranks), sys.executable, "-m", "moedist", *arguments], cache), mark


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_is_named_although_mpirun_kills_the_others(tmp_path, cache, monkeypatch, rank):
    process, mark = start_by_mpirun(cache, 3, *MPI, "phases=[{train: 4000}]", f"folder={tmp_path}", monkeypatch=monkeypatch)
    wait_for_step(tmp_path, 3, process)
    pids = ranks_of(mark)
    assert len(pids) == 3
    os.kill(pids[rank], signal.SIGKILL)
    since = time.monotonic()
    out = output_of(process, MOST_S)
    ended(pids, since)
    assert process.returncode != 0
    (line,) = our_errors(out)
    assert re.search(rf"lost rank {rank} on \S+ \(process {pids[rank]}\): killed", line), line


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks' processes in /proc")
def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path, cache, monkeypatch):
    process, mark = start_by_mpirun(cache, 3, *MPI, "phases=[{train: 4000}]", f"folder={tmp_path}", "world.timeout_s=5",
                                    monkeypatch=monkeypatch)
    wait_for_step(tmp_path, 3, process)
    pids = ranks_of(mark)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        out = output_of(process, MOST_S + 5)
    finally:
        if is_alive(pids[1]):
            os.kill(pids[1], signal.SIGKILL)
    (line,) = our_errors(out)
    assert "lost rank 1 on" in line and "no answer" in line


@pytest.mark.parametrize("fault, ranks, words, traces", [
    ("None.nothing", {1}, f"rank 1 on {os.uname().nodename}: AttributeError: 'NoneType' object has no attribute 'nothing'", 1),
    ("raise DataError('no text; write some')", {0, 1, 2}, "no text; write some", 0)])
def test_an_error_ends_all_and_is_told_once(tmp_path, cache, fault, ranks, words, traces):
    script = tmp_path / "faulty.py"
    script.write_text(FAULT.format(fault=fault, ranks=ranks))
    done = subprocess.run([*mpirun(3), sys.executable, str(script), *MPI, "phases=[{train: 20}]", f"folder={tmp_path}/runs"],
                          cwd=ROOT, env={**environment(cache), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode != 0
    assert our_errors(done.stderr) == [f"moedist: error: {words}"] and done.stderr.count("Traceback") == traces


def test_thirty_steps_have_the_losses_of_torchrun_and_gloo(tmp_path, cache):
    arguments = ["train", *QUICKSTART, "phases=[{train: 30}]", "train.eps=1e-5", "checkpoint.every=0"]
    moedist(2, cache, *arguments, f"folder={tmp_path}/gloo")
    gloo = metrics(only_run(tmp_path / "gloo"))
    for way, told in (("mpi", "rows travel by mpi"), ("islands", "rows travel by islands, between them by mpi")):
        command = [*mpirun(2), sys.executable, "-m", "moedist", *arguments, "world.transport=mpi", f"folder={tmp_path}/{way}"]
        if way == "islands":
            command += ["world.transport=islands", "world.islands=[nvidia,amd]"]
        done = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert told in done.stdout and not our_errors(done.stderr)
        found = metrics(only_run(tmp_path / way))
        assert list(found) == list(range(1, 31)) and found == pytest.approx(gloo, abs=1e-5) and found[30] < found[1] - 0.3
