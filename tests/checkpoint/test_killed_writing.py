"""SIGKILL while a checkpoint is being written, again and again: nothing is lost, ever.

MOEDIST_CRASHES sets how often (default 5).
"""

import itertools
import multiprocessing
import os
import random
import signal
import time

import torch

from moedist.checkpoint import RunFolder, Saver, check_index, load_checkpoint, mend, read_meta
from moedist.config import WorldConfig
from moedist.world import World
from tests.ranks import IMPORTED, free_port

CRASHES = int(os.environ.get("MOEDIST_CRASHES", "5"))
NUMBERS = 2**18


def tensors_of(value: float, rank: int) -> dict[str, torch.Tensor]:
    return {"dense": torch.full((NUMBERS,), value), f"layers.0.experts.{rank}.w1": torch.full((NUMBERS,), 10 * value + rank)}


def write_forever(rank: int, port: int, folder: str, first: int) -> None:
    """Save steps first, first + 1, ..., every second one twice with other numbers, as after a compression."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with World.start(WorldConfig(device="cpu", timeout_s=60)) as world:
        saver = Saver(RunFolder(folder), world, keep=2)
        for step in itertools.count(first):
            for value in (step, step + 0.5) if step % 2 else (step,):
                saver.start(step, tensors_of(value, rank), {"value": value}, background=True)
                assert saver.finish() is None


def newest_value(run: RunFolder) -> tuple[int, float]:
    """(step, value) of the newest checkpoint, every number of which is as it should be."""
    path, world = run.newest(), World()
    check_index(path, world)
    value = read_meta(path)["value"]
    for rank in range(2):
        expected = tensors_of(value, rank)
        found = {name: torch.zeros_like(t) for name, t in expected.items()}
        load_checkpoint(path, found, world)
        assert all(torch.equal(found[name], t) for name, t in expected.items())
    return run.steps()[-1], value


def in_between(run: RunFolder) -> list[str]:
    return [p.suffix for p in run.checkpoints.iterdir() if p.suffix] if run.checkpoints.is_dir() else []


def test_killed_in_mid_checkpoint_nothing_is_lost(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "tests.checkpoint.test_killed_writing"])
    run, draw, last, hits = RunFolder(tmp_path), random.Random(1), 0, 0
    for crash in range(CRASHES):
        port = free_port()
        ranks = [context.Process(target=write_forever, args=(rank, port, str(tmp_path), last + 1), daemon=True) for rank in (0, 1)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 60
        while not (run.steps() and run.steps()[-1] > last and in_between(run)):  # one more is whole, the next under way
            assert time.monotonic() < deadline and all(p.is_alive() for p in ranks)
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join(30)
        hits += bool(in_between(run))
        before, (last, value) = last, newest_value(run)
        assert last > before and value in (last, last + 0.5)
        if crash % 2:  # else the next save mends
            mend(run)
            assert not in_between(run) and newest_value(run)[0] == last
    assert hits >= CRASHES / 2, f"only {hits} of {CRASHES} kills were in mid-checkpoint"
