"""DeepSpeed ZeRO beside experts: every stage on 1, 2 and 3 ranks computes what the torch engine does in one process."""

import functools
import time

import pytest
import torch

from moedist.checkpoint import RunFolder, load_checkpoint, read_meta, save_checkpoint
from moedist.config import config_from_dict
from moedist.coordinator.migrate import migrate
from moedist.engine import build_engine, replace_experts
from moedist.engine.forward import forward_loss
from moedist.engine.zero_state import keepers
from moedist.errors import ConfigError
from moedist.model import Batch
from moedist.world import World
from tests.coordinator.test_migrate import plan_of
from tests.engine.engine_cases import Training, backward, build, full_state, pool, train, union
from tests.model.expert_forms import expert_of

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'moedist[deepspeed]')")

STAGES = (0, 1, 2, 3)
ADAMW = {"optimizer": "adamw", "lr": 1e-2, "eps": 1e-5, "weight_decay": 0.1}
OTHER_MODEL = {"tie_embeddings": False, "shared_experts": 1, "moe_every": 2, "recompute": True, "ffn_hidden": 24}


def trained(world, case, folder, steps, dtype=torch.float32):
    """Losses, and the weights and moments at the end."""
    engine = build(world, case, folder)
    return train(world, engine, steps, dtype=dtype), full_state(engine)


@functools.lru_cache(maxsize=None)
def _alone(text, steps, dtype):
    return pool(1).run(trained, eval(text, {"Training": Training}), None, steps, dtype)[0]


def alone(case, steps, dtype=torch.float32):
    """The same in one process with the torch engine."""
    return _alone(repr(Training(None, case.train, case.model, case.router, accumulate=case.accumulate)), steps, dtype)


def compare(case, ranks, folder, steps, weights, losses):
    """All ranks tell the same losses, within `losses` of one process; weights are within `weights`."""
    expected_losses, expected = alone(case, steps)
    parts = pool(ranks).run(trained, case, folder, steps)
    for found, _ in parts:
        assert found == pytest.approx(expected_losses, abs=losses)
    state = union([part for _, part in parts])
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        if not name.startswith("optimizer."):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=weights, msg=lambda text: f"{name}: {text}")
    return parts


@pytest.mark.parametrize("stage, ranks", [*((stage, 3) for stage in (None, *STAGES)), (3, 2)])
def test_thirty_steps_of_sgd(tmp_path, stage, ranks):
    """Uneven experts and batches, two parts a step, a clip that bites."""
    compare(Training(stage), ranks, tmp_path, 30, weights=1e-5, losses=1e-5)
    losses, state = alone(Training(), 30)
    assert losses[-1] < losses[0] - 0.05 and not any(name.startswith("optimizer.") for name in state)


@pytest.mark.parametrize("ranks, stage", [(1, 3), (2, 0), (3, 1), (2, 2), (3, 3)])
def test_thirty_steps_of_adamw(tmp_path, ranks, stage):
    parts = compare(Training(stage, ADAMW), ranks, tmp_path, 30, weights=2e-3, losses=1e-4)
    names = [set(part) for _, part in parts]
    if stage and ranks > 1:  # each rank offers its share of the dense state
        assert not names[0] & names[1] & {"embedding.weight", "layers.0.attention.wqkv.weight"}
        assert all("optimizer.exp_avg.norm.weight" in one for one in names if "norm.weight" in one)


@pytest.mark.parametrize("stage, offload, case", [
    (3, "none", {"model": OTHER_MODEL}), (3, "none", {"router": {"name": "soft_moe"}}),
    (3, "none", {"router": {"name": "shared_expert", "bias_rate": 0.01}, "model": {"shared_experts": 1}}),
    (3, "none", {"router": {"name": "hash"}}), (3, "none", {"router": {"name": "thor"}}),
    (3, "none", {"router": {"name": "moe_plus_plus"}}), (2, "none", {"router": {"name": "recurrent"}}),
    (3, "none", {"router": {"name": "chain"}}), (2, "none", {"model": OTHER_MODEL, "accumulate": 1}),
    (1, "cpu", {}), (2, "cpu", {}), (3, "cpu", {})], ids=str)
def test_other_models_routers_and_offload(tmp_path, stage, offload, case):
    """ZeRO-3 must gather whatever module a parameter is used in; offloading changes where gradients are found."""
    compare(Training(stage, offload=offload, **case), 3 if offload == "none" else 2, tmp_path, 8, weights=1e-5, losses=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_computes_beside_float32_weights(tmp_path, stage):
    expected = pool(2).run(trained, Training(train=ADAMW), tmp_path, 15, torch.bfloat16)[0][0]
    exact, _ = alone(Training(train=ADAMW), 15)
    (found, state), (_, other) = pool(2).run(trained, Training(stage, ADAMW), tmp_path, 15, torch.bfloat16)
    assert {t.dtype for t in (state | other).values()} == {torch.float32}
    assert found == pytest.approx(expected, abs=5e-3) and exact != pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(exact, abs=0.05)


def overflow(world, case, folder):
    """A finite step, one that overflows in an expert of the last rank, one that does not."""
    engine = build(world, case, folder)
    train(world, engine, 1)
    before, scale = full_state(engine), engine.scale
    backward(world, engine, 1)
    if world.rank == world.size - 1:
        engine.experts.parameters()[0].grad.view(-1)[0] = torch.inf
    skipped = engine.step(0.3, torch.zeros(0, dtype=torch.float64))
    after = full_state(engine)
    assert skipped.skipped and engine.scale == scale / 2 and engine.counters()["updates"] == 1
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    return train(world, engine, 2, first=2), full_state(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_float16_overflow_skips_both_optimizers(tmp_path, stage):
    train_config = {**ADAMW, "dtype": "float16"}
    (expected, state), = pool(1).run(overflow, Training(train=train_config), None)
    parts = pool(2).run(overflow, Training(stage, train_config), tmp_path)
    assert all(found == pytest.approx(expected, abs=1e-5) for found, _ in parts)
    for name, tensor in union([part for _, part in parts]).items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-4)


def saved(world, case, folder):
    """Train, save, train on; the losses after."""
    engine = build(world, case, folder)
    train(world, engine, 5)
    save_checkpoint(RunFolder(folder), 5, engine.named_tensors(), {"counters": engine.counters()}, world, 1)
    return full_state(engine), logits(world, engine), train(world, engine, 5, first=5)


def resumed(world, case, folder):
    engine = build(world, case, folder)
    checkpoint = RunFolder(folder).newest()
    load_checkpoint(checkpoint, engine.named_tensors(), world)
    engine.loaded(read_meta(checkpoint)["counters"])
    return full_state(engine), logits(world, engine), train(world, engine, 5, first=5)


@torch.no_grad()
def logits(world: World, engine):
    """Loss and hidden states of one sequence, the same on every rank, by the weights that the model computes with."""
    ids = torch.arange(6).view(1, 6)
    engine.model.eval()
    loss = forward_loss(engine.model, Batch(ids, ids, 0), ids, world.device, torch.float32)[0]
    hidden = engine.model(Batch(ids, ids, 0))[0].clone()
    engine.model.train()
    return loss, hidden


@pytest.mark.parametrize("optimizer, writer", [("adamw", (2, 1)), ("adamw", (3, 3)), ("adamw", (1, None)), ("sgd", (2, 3))],
                         ids=str)
def test_any_engine_reads_what_any_other_wrote(tmp_path, writer, optimizer):
    (ranks, stage), settings = writer, ADAMW if optimizer == "adamw" else {}
    parts = pool(ranks).run(saved, Training(stage, settings), tmp_path)
    state, (_, seen, losses) = union([part[0] for part in parts]), parts[0]
    readers = {(3, None), (1, None), (3, 3), (2, 2)} if optimizer == "adamw" else {(2, None), (2, 1)}
    for ranks, stage in readers - {writer}:
        parts = pool(ranks).run(resumed, Training(stage, settings), tmp_path)
        read = union([part[0] for part in parts])
        assert read.keys() == state.keys() and all(torch.equal(t, state[name]) for name, t in read.items())
        for _, other_seen, found in parts:  # as many rows an expert as ranks: products of other shapes round differently
            torch.testing.assert_close(other_seen, seen, rtol=1e-6, atol=1e-6)
            assert found == pytest.approx(losses, abs=1e-6)


def moved(world, case, folder, plan):
    """Experts compressed at step 2, moved and copied at step 4."""
    engine, experts = build(world, case, folder), {0: expert_of("interp", 8, 16, 3, seed=1),
                                                   2: expert_of("cur two interp", 6, 16, 2, seed=3, before=8)}
    found = train(world, engine, 2)
    replace_experts(engine, {layer: {e: experts[e] for e in moe.dispatcher.layout.primary_experts if e in experts}
                             for layer, moe in engine.model.moe_layers()})
    found += train(world, engine, 2, first=2)
    assert plan is None or migrate(world, engine, plan) > 0
    return found + train(world, engine, 3, first=4), full_state(engine)


@pytest.mark.parametrize("stage, settings", [(1, ADAMW), (3, ADAMW), (None, {}), (2, {})], ids=str)
def test_experts_are_compressed_moved_and_copied(tmp_path, stage, settings):
    plan = plan_of(3, ((0, 1), 1, (0, 1, 2), 2), (2, 2, 2, 0))
    (expected, state), = pool(1).run(moved, Training(train=settings), None, None)
    parts = pool(3).run(moved, Training(stage, settings), tmp_path, plan)
    assert all(found == pytest.approx(expected, abs=1e-5) for found, _ in parts)
    assert union([part for _, part in parts]).keys() == state.keys()


def split_sizes(world, folder):
    engine = build(world, Training(3, ADAMW), folder)
    train(world, engine, 2)
    logits(world, engine)
    left = {name: p.numel() for name, p in engine.dense.items() if p.numel()}
    return engine.dense_size, left, sum(t.numel() for name, t in engine.named_tensors().items() if ".experts." not in name)


def test_stage_3_leaves_no_rank_with_the_whole(tmp_path):
    results = pool(2).run(split_sizes, tmp_path)
    whole = results[0][0]
    for size, left, offered in results:
        assert size == whole and not left, "a parameter was not let go"
        assert offered < 0.6 * 3 * whole  # weights and two moments; the largest of the parameters is not split


def waits(world, case, folder):
    """Seconds that this rank counts as computed, where rank 1 is held up after its last exchange of rows."""
    engine = build(world, case, folder)
    train(world, engine, 2)
    if world.rank == 1:
        engine.model.layers[0].attention_norm.weight.register_hook(lambda _: time.sleep(0.5))
    world.meter.begin(0)
    backward(world, engine, 2)
    times = world.meter.take()
    engine.step(0.1, torch.zeros(0, dtype=torch.float64))
    return times.dense_s + sum(times.expert_s.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_waiting_in_deepspeed_is_not_computing(tmp_path, stage):
    fast, slow = pool(2).run(waits, Training(stage, accumulate=1), tmp_path)
    assert slow > 0.5 and fast < 0.4


def two_passes(world, folder):
    engine = build(world, Training(2, accumulate=1), folder)
    backward(world, engine, 0)
    backward(world, engine, 1)
    with pytest.raises(ValueError, match="2 forward passes before a step, but train.accumulate is 1"):
        engine.step(0.1, torch.zeros(0, dtype=torch.float64))


def test_misuse_is_told(tmp_path):
    pool(1).run(two_passes, tmp_path)
    config = config_from_dict({"engine": {"name": "deepspeed", "offload": "cpu"}})
    with pytest.raises(ConfigError, match="rank 0 trains on the CPU.*engine.offload=none"):
        build_engine(None, config, World())


def test_keepers_share_evenly():
    sizes = {f"{i}": 7 * i + 1 for i in range(40)}
    found = keepers(sizes, 3)
    loads = [sum(sizes[name] for name, rank in found.items() if rank == r) for r in range(3)]
    assert max(loads) - min(loads) <= 2 * 7 and found.keys() == sizes.keys()
