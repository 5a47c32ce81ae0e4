"""Whole trainings over islands have the losses of plain ones, on any way that rows can take."""

import functools

import pytest
import torch

from moedist.config import config_from_dict
from moedist.coordinator.migrate import migrate
from moedist.dispatch import build_transport
from moedist.engine import TorchEngine
from moedist.model import Batch, Transformer
from moedist.phases.calibrate import Source, watch_experts
from moedist.placement import LayerPlan, Plan
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.moe_cases import on_islands
from tests.ranks import run_ranks

ISLANDS = (0, 0, 1)
SEQUENCES, VOCAB, STEPS = (5, 0, 3), 21, 30
OWNERS = {"single": ((0,), (0,), (0,), (1,), (2,), (2,)), "copies": ((0, 2), (0,), (0,), (0, 1), (1,), (2,)),
          "moved": ((1,), (0, 2), (2,), (1,), (0,), (2,))}


def plan_of(places):
    layer = LayerPlan(OWNERS[places], tuple((1 / len(owners),) * len(owners) for owners in OWNERS[places]))
    return Plan(3, ((0, layer), (1, layer)), (1.0,) * 3)


def model_of(world, islands, places, dispatch, model, router="topk"):
    """A tiny model of this world as islands, if any; and the world."""
    config = config_from_dict({
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 6, "top_k": 3, "expert_hidden": 8, **model},
        "data": {"sequence_length": 6}, "dispatch": dispatch, "router": {"name": router},
        "train": {"batch": 8, "eps": 1e-5}})
    world = on_islands(world, islands)  # dense gradients too
    transformer = Transformer(config, VOCAB, plan_of(places), build_transport(world), world.device, torch.float32, world.meter)
    return transformer, config, world


def train(world, islands, places, dispatch, model, steps=STEPS):
    """Losses of so many steps of Adam, and a dense weight after them; over islands, experts move in between."""
    transformer, config, world = model_of(world, islands, places, dispatch, model)
    engine = TorchEngine(transformer, config.train, world)
    first = sum(SEQUENCES[:world.rank])
    mine = slice(first, first + SEQUENCES[world.rank])
    losses = []
    for step in range(steps):
        if islands and step == steps // 2:
            migrate(world, engine, plan_of("moved"))
        ids = (torch.arange(8).unsqueeze(1) * 5 + step + 2 * torch.arange(7)) % VOCAB
        keys = torch.arange(8 * 6).view(8, 6)[mine]
        loss, _ = engine.forward(Batch(ids[mine, :-1], keys, step), ids[mine, 1:], torch.float32)
        engine.backward(loss / 48)
        losses.append(engine.step(0.01, (loss.detach().double() / 48).reshape(1)).sums.item())
    return losses, transformer.embedding.weight.detach().clone()


@functools.lru_cache(maxsize=None)
def plain(places, shared):
    return run_ranks(3, train, (), places, {}, {"shared_experts": shared})[0][0]


@pytest.mark.parametrize("places, dispatch, model, steps", [
    ("single", {"dedup": "none", "overlap": False}, {}, STEPS),
    ("single", {}, {}, STEPS),  # auto: island, overlapped
    ("copies", {"dedup": "rank", "overlap_chunks": 2}, {"shared_experts": 1}, 8),
    ("copies", {"dedup": "island", "overlap_chunks": 2}, {"recompute": True}, 6),
], ids=str)
def test_losses_over_islands_equal_those_of_a_plain_training(places, dispatch, model, steps):
    found = run_ranks(3, train, ISLANDS, places, dispatch, model, steps)
    wanted = plain(places, model.get("shared_experts", 0))
    assert wanted[-1] < wanted[0] - 0.5
    for losses, weight in found:
        assert losses == pytest.approx(wanted[:steps], abs=1e-5)
        assert torch.equal(weight, found[0][1]), "dense weights are equal on all ranks to the bit"


@pytest.mark.parametrize("islands, dispatch", [((), {}), (ISLANDS, {"dedup": "none", "overlap": False}), (ISLANDS, {})],
                         ids=str)
def test_losses_over_mpi_equal_those_of_a_plain_training(islands, dispatch):
    """Between all ranks, and between islands."""
    for losses, _ in run_ranks(3, train, islands, "single", dispatch, {}, transport="mpi"):
        assert len(losses) == STEPS and losses == pytest.approx(plain("single", 0), abs=1e-5)


class Sequences:
    """What `Source` reads."""

    def batch(self, start, count):
        ids = (torch.arange(start, start + count).unsqueeze(1) * 5 + 2 * torch.arange(7)) % VOCAB
        return ids[:, :-1], ids[:, 1:]


def watched(world, islands, dispatch):
    transformer, *_ = model_of(world, islands, "copies", dispatch, {})
    source = Source(Sequences(), 0, 8, 4, torch.float32)
    found = watch_experts(transformer, world, source, [0, 1], {"fisher"})
    return {key: (c.fisher.clone(), c.rows.item(), c.weight.item()) for key, c in found.items()}


def test_experts_are_watched_as_in_a_plain_run():
    """Calibration sees a row for every token at every expert, whatever is shared in training."""
    plainly = run_ranks(3, watched, (), {})
    for part, other in zip(plainly, run_ranks(3, watched, ISLANDS, {"dedup": "island", "cross_dtype": "int8"})):
        assert part.keys() == other.keys() and part
        for key, (fisher, rows, weight) in part.items():
            torch.testing.assert_close(fisher, other[key][0], rtol=1e-4, atol=1e-12)
            assert rows == other[key][1] and weight == pytest.approx(other[key][2], rel=1e-5)


def test_a_run_over_islands(tmp_path, cache):
    """As a user starts it: CPU ranks play two vendors, and the losses are those of one."""
    common = ["train", *QUICKSTART, "phases=[{train: 30}]", "train.eps=1e-5", "checkpoint.every=0"]
    moedist(2, cache, *common, f"folder={tmp_path}/plain")
    done = moedist(2, cache, *common, f"folder={tmp_path}/islands", "world.islands=[nvidia,amd]", "world.transport=islands")
    assert "rows travel in islands [nvidia, amd]" in done.stdout and "one for every token and island; own rows" in done.stdout
    islands = only_run(tmp_path / "islands")
    assert metrics(islands, "comm/other_islands_bytes")[30] > 0 < metrics(islands, "comm/layer.1/other_islands_ms")[30]
    assert metrics(islands, "comm/dedup_ratio")[30] <= 1
    assert list(metrics(islands).values()) == pytest.approx(list(metrics(only_run(tmp_path / "plain")).values()), abs=1e-5)
