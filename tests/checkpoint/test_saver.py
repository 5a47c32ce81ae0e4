"""Saving while training goes on: what is written is what was there, one at a time, and failures leave what was before."""

import json
import resource
import subprocess
import time

import pytest
import torch

from moedist.checkpoint import RunFolder, Saver, load_checkpoint, read_meta, save_checkpoint
from moedist.errors import CheckpointError
from moedist.world import World
from tests.checkpoint.test_checkpoint import filled, load, save
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.ranks import run_ranks

MIB = 2**20


def saved_and_overwritten(world, folder, counts):
    engine = filled(world, counts)
    saver = Saver(RunFolder(folder), world, 2)
    saver.start(3, engine.named_tensors(), {"step": 3}, background=True)
    for tensor in engine.named_tensors().values():  # training goes on
        tensor.fill_(7)
    assert saver.finish() is None
    return sorted(engine.named_tensors())


@pytest.mark.parametrize("counts", [[4], [3, 1]])
def test_in_the_background_the_same_is_written(tmp_path, counts):
    run_ranks(len(counts), saved_and_overwritten, tmp_path / "later", counts)
    run_ranks(len(counts), save, tmp_path / "now", counts)
    run_ranks(1, load, tmp_path / "later", [4])
    later, now = (json.loads((RunFolder(tmp_path / name).newest() / "hashes.json").read_text()) for name in ("later", "now"))
    assert later["experts"] == now["experts"] and later["tensors"] == now["tensors"]


def stepwise(world, folder):
    """As training does: nobody waits, and what is agreed on is agreed on between steps."""
    saver, x = Saver(RunFolder(folder), world, 2), torch.ones(MIB // 4)
    saver.start(1, {f"x{world.rank}": x, "dense": x}, {}, background=True)
    steps = 0
    while world.all_reduce_(torch.tensor([float(saver.written)])).item() < world.size:
        steps += 1
        time.sleep(0.001)
    saver.commit()
    assert not saver.written
    deadline, news = time.monotonic() + 30, []
    while world.is_main and not news and time.monotonic() < deadline:
        news = saver.news()
        time.sleep(0.001)
    saver.start(2, {f"x{world.rank}": x + 1, "dense": x}, {}, background=True)
    second_began_after_first = RunFolder(folder).steps() == [1]
    saver.start(3, {f"x{world.rank}": x + 2, "dense": x}, {}, background=True)  # waits for the one before
    third_began_after_second = RunFolder(folder).steps() == [1, 2]
    failure = saver.finish()
    return steps, [s.bytes for s in news], second_began_after_first and third_began_after_second, failure


def test_steps_go_on_and_one_write_is_in_flight(tmp_path):
    main, other = run_ranks(2, stepwise, tmp_path)
    assert main[0] == other[0] > 0
    assert main[1] == [3 * MIB] and other[1] == []  # the dense tensor once
    assert main[2] and other[2] and main[3] is None and other[3] is None
    assert RunFolder(tmp_path).steps() == [2, 3]
    found = {name: torch.zeros(MIB // 4) for name in ("x0", "x1", "dense")}
    load_checkpoint(RunFolder(tmp_path).newest(), found, World())
    assert [t[0].item() for t in found.values()] == [3, 3, 1] and all((t == t[0]).all() for t in found.values())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; `small_disk(size)` makes it so large."""
    where = tmp_path / "disk"
    where.mkdir()

    def make(size: str):
        options = f"remount,size={size}" if where.is_mount() else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
        return where

    yield make
    if where.is_mount():
        subprocess.run(["umount", "-l", str(where)], check=True)


def save_block(world, folder, step):
    """1.5 MiB on each rank; the error that each rank has, if any."""
    try:
        save_checkpoint(RunFolder(folder), step, {f"x{world.rank}": torch.full((3 * MIB // 8,), float(step))}, {}, world, 2)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, small_disk, size):
    folder = small_disk("8m")
    ballast = folder / "ballast"
    ballast.write_bytes(b"x" * (MIB * 11 // 2 if size == 1 else MIB * 7 // 2))  # room for one and a half
    assert run_ranks(size, save_block, folder, 1) == [None] * size
    told = run_ranks(size, save_block, folder, 2)
    assert told[0] == told[-1] and "No space left" in told[0] and "1.5 MiB to write" in told[0] and "MiB are free" in told[0]
    assert RunFolder(folder).steps() == [1] and len(list((folder / "checkpoints").iterdir())) == 1
    found = {"x0": torch.zeros(3 * MIB // 8)}
    load_checkpoint(RunFolder(folder).newest(), found, World())
    assert (found["x0"] == 1).all()
    ballast.unlink()
    assert run_ranks(size, save_block, folder, 3) == [None] * size and RunFolder(folder).steps() == [1, 3]


def save_limited(world, folder, step, limited_rank):
    """No file of one rank may be larger than 1 MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        return save_block(world, folder, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_hear_of_one_that_cannot_write(tmp_path, rank):
    assert run_ranks(2, save_block, tmp_path, 1) == [None, None]
    told = run_ranks(2, save_limited, tmp_path, 2, rank)
    assert told[0] == told[1] and f"rank {rank}" in told[0] and "File too large" in told[0]
    assert RunFolder(tmp_path).steps() == [1] and len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert run_ranks(2, save_block, tmp_path, 2) == [None, None] and RunFolder(tmp_path).steps() == [1, 2]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    told = run_ranks(2, save_block, tmp_path, 1)
    assert told[0] == told[1] and "Not a directory" in told[0]


def test_a_run_whose_disk_fills_goes_on_and_ends_with_an_error(tmp_path, cache, small_disk):
    """The first checkpoint fits. What cannot be written later is told, training goes on; the last one is an error."""
    folder = small_disk("1500k")
    common = [*QUICKSTART, "phases=[{train: 9}]", "checkpoint.every=3", "placement.counts=null", "placement.batch_shares=null"]
    moedist(1, cache, "train", *common, f"folder={tmp_path}/whole")
    failed = moedist(1, cache, "train", *common, f"folder={folder}", ok=False)
    run = only_run(folder)
    assert "warning: could not write" in failed.stdout and "No space left" in failed.stdout
    assert failed.stderr.count("moedist: error: could not write") == 1 and f"--resume {run}" in failed.stderr
    assert "Traceback" not in failed.stderr and RunFolder(run).steps() == [3] and max(metrics(run)) == 9
    assert read_meta(RunFolder(run).newest())["progress"]["step"] == 3
    small_disk("64m")
    moedist(1, cache, "train", "--resume", str(run))
    assert RunFolder(run).steps() == [6, 9] and metrics(run) == metrics(only_run(tmp_path / "whole"))
