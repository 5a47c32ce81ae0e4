"""A rank fails, by an error, a kill, or silence: all end within seconds, one line names it, and the run goes on later.

MOEDIST_CRASHES sets how often a rank is killed in `test_killed_again_and_again` (default 2).
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from moedist.checkpoint import RunFolder
from moedist.faults import is_alive, is_lost_rank
from tests.launching import QUICKSTART, ROOT, environment, metrics, moedist, only_run, output_of, start, wait_for_step
from tests.ranks import free_port

CRASHES = int(os.environ.get("MOEDIST_CRASHES", "2"))
MOST_S = 30
COMMON = ["train", *QUICKSTART, "placement.counts=null", "placement.batch_shares=null", "placement.planner=equal",
          "model.dropout=0.1"]


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of a torchrun's ranks, in the order of ranks."""
    return [int(p) for p in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()]


def ended(processes: list[int], since: float) -> float:
    """Seconds until none of the processes is left; fails where that is too late."""
    while any(map(is_alive, processes)):
        assert time.monotonic() - since < MOST_S, f"still there after {MOST_S} s: {[p for p in processes if is_alive(p)]}"
        time.sleep(0.05)
    return time.monotonic() - since


def our_errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("moedist: error")]


def test_killed_again_and_again_the_losses_are_those_of_a_whole_run(tmp_path, cache):
    """One run, killed on a rank at a random step and resumed, over and over."""
    between = 8  # steps, on average, from a start to a kill
    steps, draw = between * (CRASHES + 1), random.Random(4)
    arguments = [*COMMON, f"phases=[{{train: {steps}}}]", "checkpoint.every=3", "checkpoint.keep=2"]
    moedist(3, cache, *arguments, f"folder={tmp_path}/whole")
    folder, reached = tmp_path / "killed", 0
    for crash in range(CRASHES):
        process = start(3, cache, *arguments, f"folder={folder}", "--resume", "auto")
        reached = min(steps - 2, reached + draw.randint(2, between))
        run = wait_for_step(folder, reached, process)
        pids, rank = ranks_of(process), draw.randrange(3)
        time.sleep(draw.random() * 0.05)
        os.kill(pids[rank], signal.SIGKILL)
        since = time.monotonic()
        out = output_of(process, MOST_S)
        ended(pids, since)
        assert process.returncode != 0
        (line,) = our_errors(out)
        assert re.search(rf"lost rank {rank} on \S+ \(process {pids[rank]}\): killed", line), line
        if RunFolder(run).steps():
            reached = RunFolder(run).steps()[-1]
            RunFolder(run).forget_metrics_after(reached)  # or the next wait would find its step at once
        else:  # killed before the first checkpoint: started afresh, in another folder
            subprocess.run(["rm", "-r", str(run)], check=True)
            reached = 0
    moedist(3, cache, *arguments, f"folder={folder}", "--resume", "auto")
    assert metrics(only_run(folder)) == metrics(only_run(tmp_path / "whole"))


def test_after_a_death_fewer_ranks_go_on(tmp_path, cache):
    arguments = [*COMMON, "phases=[{train: 12}]", "checkpoint.every=3", "train.dtype=float64", "train.eps=1e-5", "model.dropout=0"]
    process = start(3, cache, *arguments, f"folder={tmp_path}/killed", "checkpoint.asynchronous=false")
    run = wait_for_step(tmp_path / "killed", 7, process)
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    out = output_of(process, MOST_S)
    assert len(our_errors(out)) == 1 and "lost rank 0" in out
    moedist(2, cache, "train", "--resume", str(run))
    moedist(1, cache, *arguments, f"folder={tmp_path}/whole")
    assert metrics(run) == pytest.approx(metrics(only_run(tmp_path / "whole")), rel=1e-8)


FAULT = """
import sys
import moedist.phases.train as train
from moedist.cli import main
from moedist.errors import DataError
from moedist.rendezvous.launch import find_launch

step = train.train_step

def faulty(run):
    if run.progress.step == 3 and find_launch().rank in {ranks}:
        {fault}
    return step(run)

train.train_step = faulty
main(sys.argv[1:])
"""
FAULTS = {  # what a rank does, and what is told of it
    "a bug": ("None.nothing", "rank 1 on HOST: AttributeError: 'NoneType' object has no attribute 'nothing'"),
    "no memory": ("import torch; torch.empty(2**60)", "rank 1 on HOST: RuntimeError: .*memory"),
    "an error to be mended": ("raise DataError('no text; write some')", "rank 1 on HOST: no text; write some"),
    "a slow bug of a rank that all wait for": ("import time; time.sleep(3); 1 / 0", "rank 1 on HOST: ZeroDivisionError"),
}


def launch_fault(tmp_path, cache, fault: str, ranks: set[int], launcher: str | None = None) -> subprocess.CompletedProcess:
    script = tmp_path / "faulty.py"
    script.write_text(FAULT.format(fault=fault, ranks=ranks))
    return moedist(3, cache, *COMMON, "phases=[{train: 20}]", f"folder={tmp_path}/runs", ok=False, timeout=120, script=script,
                   launcher=launcher)


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_an_error_of_one_rank_ends_all_and_is_told_once(tmp_path, cache, name):
    fault, words = FAULTS[name]
    done = launch_fault(tmp_path, cache, fault, {1}, "torchrun" if name == "a bug" else None)
    (line,) = our_errors(done.stderr)
    assert re.match("moedist: error: " + words.replace("HOST", os.uname().nodename), line), line
    ours = done.stderr.partition("moedist: error")[0]  # torchrun's own trace comes after
    assert ours.count("Traceback") == (0 if "mended" in name else 1)


def test_the_same_error_of_all_ranks_is_told_once_and_names_none(tmp_path, cache):
    done = launch_fault(tmp_path, cache, "raise DataError('no text; write some')", {0, 1, 2})
    assert our_errors(done.stderr) == ["moedist: error: no text; write some"]


def start_plain(cache, size: int, *arguments: str) -> list[subprocess.Popen]:
    """`moedist` on ranks without a launcher that would end the others; rank 0 keeps the store."""
    return start_ranks(cache, size, "-m", "moedist", *arguments)


def start_ranks(cache, size: int, *arguments: str) -> list[subprocess.Popen]:
    """The same for any Python."""
    port = free_port()
    return [subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True,
                             env={**environment(cache), "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(size)]


@pytest.mark.parametrize("rank", [0, 2])
def test_without_a_launcher_the_others_end_by_themselves(tmp_path, cache, rank):
    """Rank 0 takes the store with it."""
    processes = start_plain(cache, 3, *COMMON, "phases=[{train: 4000}]", "checkpoint.every=0", f"folder={tmp_path}")
    wait_for_step(tmp_path, 3, processes[0])
    processes[rank].kill()
    since = time.monotonic()
    out = "".join(output_of(p, MOST_S) for p in processes)
    assert time.monotonic() - since < MOST_S and all(p.returncode for p in processes)
    (line,) = our_errors(out)
    assert f"lost rank {rank} on {os.uname().nodename} (process {processes[rank].pid}): killed" in line


def test_a_good_end_leaves_no_stack_trace_of_torch_on_ranks_that_end_later(cache):
    """Rank 0 keeps the store."""
    script = ("import time; from moedist.config import WorldConfig; from moedist.world import World, leave_process\n"
              "with World.start(WorldConfig(transport='torchdist')) as world:\n"
              "    world.barrier()\n"
              "    time.sleep(0.5 * world.rank)\n"
              "leave_process()")
    processes = start_ranks(cache, 3, "-c", script)
    assert [(output_of(p, MOST_S), p.returncode) for p in processes] == [("", 0)] * 3


def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path, cache):
    processes = start_plain(cache, 3, *COMMON, "phases=[{train: 4000}]", "checkpoint.every=0", f"folder={tmp_path}",
                            "world.timeout_s=6")
    wait_for_step(tmp_path, 3, processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    try:
        out = "".join(output_of(processes[r], MOST_S + 6) for r in (0, 2))
    finally:
        processes[1].kill()
        processes[1].communicate()
    (line,) = our_errors(out)
    assert "lost rank 1 on" in line and "no answer" in line


def test_a_process_that_has_ended_is_not_alive():
    process = subprocess.Popen(["true"])
    while is_alive(process.pid):  # a zombie, until it is waited for
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{process.pid}/stat") and is_alive(os.getpid())
    process.wait()
    assert not is_alive(process.pid)


def test_lost_ranks_are_told_from_bugs():
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711")
    wrapped = ValueError("while exchanging rows")
    wrapped.__cause__ = lost
    assert is_lost_rank(lost) and is_lost_rank(wrapped)
    assert not is_lost_rank(RuntimeError("shape mismatch")) and not is_lost_rank(ValueError("Broken pipe"))
