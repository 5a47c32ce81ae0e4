"""Hashes: equal for equal contents, wherever they come from; and no byte of a checkpoint can change unseen."""

import doctest
import json
import random

import pytest
import torch

import moedist.checkpoint.hashes as hashes
import moedist.checkpoint.parts as parts
from moedist.checkpoint import DamagedCheckpoint, RunFolder, check_index, load_checkpoint, read_meta, save_checkpoint
from moedist.checkpoint.hashes import Hashes, content_hash
from moedist.world import World
from tests.checkpoint.test_checkpoint import filled, save
from tests.engine.test_engine import engine_of
from tests.ranks import run_ranks

FLIPS = 150


@pytest.mark.parametrize("module", [hashes, parts])
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_contents_decide_and_nothing_else():
    x = torch.arange(12.0).view(3, 4)
    same = torch.zeros(4, 6)[:, ::2].t().copy_(x)
    assert content_hash(x) == content_hash(same) == content_hash(x.clone().requires_grad_())
    others = [x + 1, x.view(4, 3), x.double(), x.view(torch.int32), x[:2], torch.zeros(0), torch.tensor(1.0), x.bfloat16()]
    assert len({content_hash(t) for t in [x, *others]}) == 1 + len(others)


def test_every_world_writes_the_same_hashes(tmp_path):
    found = []
    for i, counts in enumerate(([4], [1, 3], [0, 3, 1])):
        run_ranks(len(counts), save, tmp_path / str(i), counts)
        found.append(json.loads((RunFolder(tmp_path / str(i)).newest() / "hashes.json").read_text()))
    assert found[0]["experts"] == found[1]["experts"] == found[2]["experts"]
    assert sorted(found[0]["experts"]) == [f"layers.{i}.experts.{e}" for i in range(2) for e in range(4)]
    contents = [{name: sha for name, (sha, _) in f["tensors"].items()} for f in found]
    assert contents[0] == contents[1] == contents[2]
    assert "optimizer.exp_avg.layers.1.experts.3.w2" in contents[0] and "embedding.weight" in contents[0]


def whole(checkpoint) -> None:
    """Read all that a checkpoint has, as a resumed run does."""
    check_index(checkpoint, World())
    engine = engine_of(World(), [4])
    load_checkpoint(checkpoint, engine.named_tensors(), World())


def flipped(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_any_flipped_bit_of_any_file_is_seen(tmp_path):
    """Not in tensors alone: in their headers, the padding between them, the index and the facts too."""
    run_ranks(2, save, tmp_path, [1, 3])
    checkpoint = RunFolder(tmp_path).newest()
    whole(checkpoint)
    files = sorted(p for p in checkpoint.iterdir())
    assert [p.name for p in files] == [".metadata", "__0_0.distcp", "__1_0.distcp", "hashes.json", "meta.json"]
    draw = random.Random(0)
    for i in range(FLIPS):
        path = files[i % len(files)]
        at, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flipped(path, at, bit)
        with pytest.raises(DamagedCheckpoint) as error:
            whole(checkpoint)
        if path.suffix == ".distcp":
            assert path.name in str(error.value), (path, at, bit)
        flipped(path, at, bit)
    whole(checkpoint)


def test_the_damaged_expert_and_file_are_named(tmp_path):
    run_ranks(2, save, tmp_path, [1, 3])
    checkpoint = RunFolder(tmp_path).newest()
    expected = filled(World(), [4]).named_tensors()["layers.1.experts.3.w3"]
    data = (checkpoint / "__1_0.distcp").read_bytes()
    at = data.index(expected.numpy().tobytes())
    flipped(checkpoint / "__1_0.distcp", at + 8, 3)
    with pytest.raises(DamagedCheckpoint, match=r"__1_0.distcp.*layers.1.experts.3.w3 \(expert 3 of layer 1\).*older"):
        whole(checkpoint)
    # who does not read it does not mind: other ranks, and readers of weights alone
    load_checkpoint(checkpoint, {"norm.weight": torch.zeros(16, dtype=torch.float64)}, World())


def load_one(world, checkpoint, names):
    """Rank r reads names[r]; returns the error that every rank gets."""
    tensors = filled(World(), [4]).named_tensors()
    try:
        load_checkpoint(checkpoint, {names[world.rank]: tensors[names[world.rank]]}, world)
    except DamagedCheckpoint as error:
        return error.reason
    return None


def test_all_ranks_hear_of_damage_that_one_has_found(tmp_path):
    run_ranks(1, save, tmp_path, [4])
    checkpoint = RunFolder(tmp_path).newest()
    data = (checkpoint / "__0_0.distcp").read_bytes()
    at = data.index(filled(World(), [4]).named_tensors()["layers.0.experts.0.w1"].numpy().tobytes())
    flipped(checkpoint / "__0_0.distcp", at, 0)
    told = run_ranks(2, load_one, checkpoint, ["norm.weight", "layers.0.experts.0.w1"])
    assert told[0] == told[1] and "expert 0 of layer 0" in told[0]


def test_numbers_are_verified_before_they_are_converted(tmp_path):
    world, x = World(), torch.randn(5)
    save_checkpoint(RunFolder(tmp_path), 1, {"x": x}, {}, world, 1)
    target = torch.zeros(5, dtype=torch.float64)
    load_checkpoint(RunFolder(tmp_path).newest(), {"x": target}, world)
    assert torch.equal(target, x.double())
    wrong = json.loads((RunFolder(tmp_path).newest() / "hashes.json").read_text())
    wrong["tensors"]["x"][0] = content_hash(x.double())
    (RunFolder(tmp_path).newest() / "hashes.json").write_text(json.dumps(wrong))
    with pytest.raises(DamagedCheckpoint, match="x is not what was written"):
        load_checkpoint(RunFolder(tmp_path).newest(), {"x": target}, world)


def test_a_checkpoint_without_hashes_is_not_whole(tmp_path):
    run_ranks(1, save, tmp_path, [4])
    checkpoint = RunFolder(tmp_path).newest()
    assert Hashes(checkpoint).of_file("meta.json") is None
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp has 0 bytes"):
        check_index(checkpoint, World())
    (checkpoint / "hashes.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="not a complete checkpoint"):
        read_meta(checkpoint)
