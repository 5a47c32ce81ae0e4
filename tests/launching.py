"""Start real runs as a user does: torchrun and the command line, on tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.warm import WarmLauncher

ROOT = Path(__file__).parents[1]
# a dozen documents, bytes as tokens: seconds instead of minutes
TINY = ["data.max_documents=12", "data.tokenizer=byte", "data.sequence_length=32", "model.layers=2", "model.width=32",
        "model.heads=2", "model.kv_heads=1", "model.expert_hidden=24", "train.batch=8", "train.warmup_steps=2",
        "train.eval_every=0", "train.eval_tokens=512", "monitor.log_every=1", "monitor.wandb=disabled"]
# uneven on purpose, and written down: nothing is measured
QUICKSTART = ["configs/quickstart.yaml", "placement.counts=[5,3]", "placement.batch_shares=[5,3]", "phases=[{train: 300}]",
              *TINY]


def environment(cache: Path) -> dict[str, str]:
    """As a user's shell, with one thread a rank and the token cache of the tests."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
                                                              "MASTER_PORT")}
    return {**clean, "OMP_NUM_THREADS": "1", "MOEDIST_CACHE": str(cache), "WANDB_MODE": "offline"}


def command(ranks: int, *arguments: str) -> list[str]:
    """`moedist ARGUMENTS` on this many ranks."""
    python = [sys.executable, "-m"]
    if ranks == 1:
        return [*python, "moedist", *arguments]
    return [*python, "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks),
            "-m", "moedist", *arguments]


def moedist(ranks: int, cache: Path, *arguments: str, ok: bool = True, timeout: float = 240, script: Path | None = None,
            launcher: str | None = None) -> subprocess.CompletedProcess:
    """Run moedist, or a script, to the end; fails with the output if the exit code is not what `ok` says.

    Ranks are forked from a process that has everything imported; MOEDIST_TEST_LAUNCH=torchrun starts all as a user does,
    `launcher="torchrun"` one.
    """
    if (launcher or os.environ.get("MOEDIST_TEST_LAUNCH", "warm")) == "torchrun":
        whole = command(ranks, *arguments)
        if script:
            at = whole.index("moedist")
            whole[at - 1:at + 1] = [str(script)]
        done = subprocess.run(whole, cwd=ROOT, env={**environment(cache), "PYTHONPATH": str(ROOT)}, capture_output=True,
                              text=True, timeout=timeout)
    else:
        done = _warm().run(ranks, [str(a) for a in arguments], environment(cache), free_port(), timeout,
                           script and str(script))
    assert (done.returncode == 0) == ok, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


_warm_launchers: list[WarmLauncher] = []


def _warm() -> WarmLauncher:
    if not _warm_launchers or _warm_launchers[-1].ended:
        _warm_launchers.append(WarmLauncher(environment(Path())))
    return _warm_launchers[-1]


def start(ranks: int, cache: Path, *arguments: str) -> subprocess.Popen:
    """Start in a process group of its own and return at once."""
    return start_command(command(ranks, *arguments), cache)


def start_command(arguments: list[str], cache: Path) -> subprocess.Popen:
    """As `start`, for any command."""
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def output_of(process: subprocess.Popen, timeout: float) -> str:
    """What it printed until it ended; fails with that, and ends its whole process group, where it is too slow."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        pytest.fail(f"still there after {timeout:g} s; it printed\n{process.communicate()[0]}")


def only_run(folder: Path) -> Path:
    """The one run folder in `folder`."""
    (run,) = [p for p in folder.iterdir() if p.is_dir()]
    return run


def metrics(run: Path, name: str = "train/loss") -> dict[int, float]:
    """step -> value of a metric."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, timeout: float = 90) -> Path:
    """The run folder, once `step` is in its metrics."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for run in folder.glob("*"):
            text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
            if f'"step": {step},' in text:
                return run
        assert process.poll() is None, f"ended with {process.returncode} before step {step}:\n{process.stdout.read()}"
        time.sleep(0.02)
    pytest.fail(f"no step {step} in {timeout:g} s:\n{output_of(process, 0)}")
