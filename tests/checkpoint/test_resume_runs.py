"""Whole runs that go on: from the newest checkpoint that is whole, or from none; by hand, requeued, or restarted by torchrun."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from torch.distributed.checkpoint import FileSystemReader

from moedist.checkpoint import RunFolder, read_meta
from tests.launching import QUICKSTART, command, metrics, moedist, only_run, output_of, start_command, wait_for_step
from tests.ranks import free_port

STEPS = 12
COMMON = ["train", *QUICKSTART, f"phases=[{{train: {STEPS}}}]", "checkpoint.every=3", "checkpoint.keep=9", "model.dropout=0.1",
          "placement.counts=null", "placement.batch_shares=null", "placement.planner=equal"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An uninterrupted run on one rank, checkpoints written in the background."""
    folder = tmp_path_factory.mktemp("whole")
    moedist(1, cache, *COMMON, f"folder={folder}")
    return only_run(folder)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(whole, tmp_path / whole.name)
    return tmp_path / whole.name


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_waiting_for_checkpoints_changes_nothing(whole, cache, tmp_path):
    moedist(1, cache, *COMMON, f"folder={tmp_path}", "checkpoint.asynchronous=false")
    run = only_run(tmp_path)
    assert metrics(run) == metrics(whole) and len(metrics(run)) == STEPS
    for step in (3, 12):
        one, other = (RunFolder(r).checkpoint(step) / "hashes.json" for r in (run, whole))
        one, other = (path.read_text().partition('"tensors"')[2] for path in (one, other))
        assert one == other
    told = (whole / "metrics.jsonl").read_text()
    assert told.count('"checkpoint/blocked_ms"') == told.count('"checkpoint/seconds"') == 4


def test_the_newest_whole_one_is_taken_and_damage_is_told(copy, whole, cache):
    run = RunFolder(copy)
    (data,) = run.checkpoint(12).glob("*.distcp")
    flip(data, data.stat().st_size // 2)
    (run.checkpoint(9) / ".metadata").write_bytes(b"nonsense")
    done = moedist(1, cache, "train", "--resume", str(copy))
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "resuming after step 6" in done.stdout
    assert "step-00000012 cannot be read: __0_0.distcp is not what was written, at" in warnings[0]
    assert "step-00000009 cannot be read: .metadata is not what was written" in warnings[1]
    assert metrics(copy) == metrics(whole)
    assert run.steps() == [3, 6, 9, 12]  # written again; the damaged ones are set aside
    assert sorted(p.name for p in run.checkpoints.glob("*.damaged")) == ["step-00000009.damaged", "step-00000012.damaged"]


def test_evaluation_names_the_damage(copy, cache):
    newest = RunFolder(copy).checkpoint(12)
    places = FileSystemReader(str(newest)).read_metadata().storage_data
    (weight,) = [place for key, place in places.items() if key.fqn == "layers.1.experts.4.w2"]
    flip(newest / weight.relative_path, weight.offset + weight.length // 2)
    failed = moedist(1, cache, "evaluate", str(copy), ok=False)
    assert "at layers.1.experts.4.w2 (expert 4 of layer 1)" in failed.stderr and "older one" in failed.stderr and "Traceback" not in failed.stderr
    assert "perplexity" in moedist(1, cache, "evaluate", str(copy), "--step", "9", "train.batch=256").stdout


def test_all_damaged_is_an_error_and_moves_nothing(copy, cache):
    for step in RunFolder(copy).steps():
        (RunFolder(copy).checkpoint(step) / "hashes.json").write_text("{}")
    before = sorted(p.name for p in (copy / "checkpoints").iterdir())
    failed = moedist(1, cache, "train", "--resume", str(copy), ok=False)
    assert "moedist: error:" in failed.stderr and "step-0000000" in failed.stderr and "Traceback" not in failed.stderr
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == before


def test_the_best_checkpoint_stays(tmp_path, cache):
    """A learning rate far too high from step 5 on: the losses rise again, and the best is an old one."""
    bad = moedist(1, cache, *COMMON, f"folder={tmp_path}", "checkpoint.keep_best=1", ok=False)
    assert "checkpoint.keep_best=1" in bad.stderr and "train.eval_every=3" in bad.stderr and not any(tmp_path.iterdir())
    moedist(1, cache, *COMMON, f"folder={tmp_path}", "checkpoint.keep_best=1", "checkpoint.keep=1", "train.eval_every=3",
            "train.lr=0.5", "train.warmup_steps=10", "train.schedule=constant", "data.max_documents=150")
    run = RunFolder(only_run(tmp_path))
    losses = metrics(run.path, "valid/loss")
    best = min(losses, key=losses.get)
    assert best != STEPS, f"this test needs a run that gets worse: {losses}"
    assert run.steps() == [best, STEPS]
    assert read_meta(run.checkpoint(best))["valid_loss"] == pytest.approx(losses[best])


def test_a_requeued_job_starts_then_goes_on(tmp_path, cache, whole):
    """The same command every time: `resume: auto`."""
    first = moedist(1, cache, *COMMON, f"folder={tmp_path}", "resume=auto")
    assert "resuming" not in first.stdout
    run = only_run(tmp_path)
    for step in (9, 12):
        shutil.rmtree(RunFolder(run).checkpoint(step))  # as if it had been ended after step 8
    again = moedist(1, cache, *COMMON, f"folder={tmp_path}", "--resume", "auto")
    assert "resuming after step 6" in again.stdout and only_run(tmp_path) == run
    assert metrics(run) == metrics(whole)


RESTARTED = [*COMMON, "checkpoint.asynchronous=false", "resume=auto"]


def test_torchrun_restarts_go_on_from_the_last_checkpoint(tmp_path, cache, whole_restarted):
    torchrun = command(2, *RESTARTED, f"folder={tmp_path}")
    torchrun[3:3] = ["--max-restarts", "2"]
    process = start_command(torchrun, cache)
    kill_one(tmp_path, process)
    out = output_of(process, 120)
    assert process.returncode == 0 and "lost rank" in out and "resuming after step" in out, out
    assert metrics(only_run(tmp_path)) == whole_restarted


def test_all_nodes_restart_where_one_has_lost_a_rank(tmp_path, cache, whole_restarted):
    """Two torchruns, as on two nodes: only that of the lost rank counts a restart."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", "--nnodes", "2", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "nodes", "--local-addr",
                "127.0.0.1", "-m", "moedist", *RESTARTED, f"folder={tmp_path}"]
    nodes = [start_command(torchrun, cache) for _ in range(2)]
    kill_one(tmp_path, nodes[1])
    out = [output_of(node, 120) for node in nodes]
    assert all(node.returncode == 0 for node in nodes) and "resuming after step" in "".join(out), "\n".join(out)
    assert metrics(only_run(tmp_path)) == whole_restarted


@pytest.fixture(scope="module")
def whole_restarted(tmp_path_factory, cache):
    """Losses without a restart."""
    folder = tmp_path_factory.mktemp("whole_restarted")
    moedist(2, cache, *RESTARTED, f"folder={folder}")
    return metrics(only_run(folder))


def kill_one(folder, launcher):
    """Kill the launcher's last rank, after step 5."""
    wait_for_step(folder, 5, launcher)
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
