"""Checkpoints: written by one world and placement, read by another; damage and strangers are named."""

import json

import pytest
import torch

from moedist.checkpoint import RunFolder, find_run, load_checkpoint, read_meta, save_checkpoint
from moedist.errors import CheckpointError
from moedist.world import World
from tests.engine.test_engine import engine_of
from tests.ranks import run_ranks


def filled(world, counts):
    """An engine whose every tensor is a function of its name alone."""
    engine = engine_of(world, counts)
    for name, tensor in engine.named_tensors().items():
        torch.manual_seed(sum(map(ord, name)))
        tensor.copy_(torch.rand_like(tensor))
    return engine


def save(world, folder, counts, step=3, keep=2):
    engine = filled(world, counts)
    save_checkpoint(RunFolder(folder), step, engine.named_tensors(), {"step": step, "world": world.size}, world, keep)
    return sorted(engine.named_tensors())


def load(world, folder, counts):
    engine, expected = engine_of(world, counts), filled(world, counts)
    load_checkpoint(RunFolder(folder).newest(), engine.named_tensors(), world)
    for (name, tensor), other in zip(engine.named_tensors().items(), expected.named_tensors().values()):
        assert torch.equal(tensor, other), name
    return sorted(engine.named_tensors())


@pytest.mark.parametrize("writer, reader", [([4], [1, 3]), ([3, 1], [4]), ([1, 3], [2, 0, 2]), ([0, 1, 3], [3, 1])])
def test_any_world_reads_what_any_other_wrote(tmp_path, writer, reader):
    written = set().union(*run_ranks(len(writer), save, tmp_path, writer))
    read = set().union(*run_ranks(len(reader), load, tmp_path, reader))
    assert written == read and "optimizer.exp_avg.layers.1.experts.3.w2" in read
    assert read_meta(RunFolder(tmp_path).newest()) == {"step": 3, "world": len(writer)}


def test_only_the_newest_are_kept_and_partial_ones_do_not_count(tmp_path):
    for step in (1, 2, 10, 9):
        run_ranks(1, save, tmp_path, [4], step)
    run = RunFolder(tmp_path)
    assert run.steps() == [9, 10]
    (tmp_path / "checkpoints" / "step-00000011.part").mkdir()
    assert run.newest().name == "step-00000010"


def test_another_model_a_missing_name_and_damage_are_refused(tmp_path):
    run_ranks(1, save, tmp_path, [4])
    checkpoint = RunFolder(tmp_path).newest()
    world = World()
    with pytest.raises(CheckpointError, match="shape.*another model"):
        load_checkpoint(checkpoint, {"norm.weight": torch.zeros(17)}, world)
    with pytest.raises(CheckpointError, match="'nothing'"):
        load_checkpoint(checkpoint, {"nothing": torch.zeros(1)}, world)
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(checkpoint, {"norm.weight": torch.zeros(16, dtype=torch.float64)}, world)
    (checkpoint / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(checkpoint, {}, world)
    (checkpoint / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_meta(checkpoint)


def test_find_run_takes_the_newest_that_can_be_resumed(tmp_path):
    for name in ("a-20260101-000000", "a-20260102-000000", "a-20260103-000000", "a-b-20260104-000000"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="3 without one"):
        find_run(tmp_path, "a")
    for name in ("a-20260101-000000", "a-20260102-000000", "a-b-20260104-000000"):
        (tmp_path / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert find_run(tmp_path, "a").path.name == "a-20260102-000000"


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path):
    lines = [json.dumps({"step": s, "x": s}) for s in (1, 2, 3)] + ['{"step": 4, "x"']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    RunFolder(tmp_path).forget_metrics_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
