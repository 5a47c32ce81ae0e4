"""Ranks measured for real: one is slowed four times, and looks it; nothing else changes."""

import dataclasses

import pytest
import torch

from moedist.config import Config, config_from_dict
from moedist.coordinator.facts import RankFacts
from moedist.coordinator.probe import probe
from moedist.coordinator.sizes import likely_vocab
from moedist.dispatch import build_transport
from moedist.timing import Meter, Throttle
from moedist.world import World
from tests.ranks import run_ranks

TREE = {"data": {"tokenizer": "byte", "sequence_length": 64}, "train": {"batch": 32},
        "model": {"layers": 2, "width": 128, "heads": 2, "kv_heads": 1, "experts": 8, "expert_hidden": 256},
        "placement": {"probe_s": 2.0}}
# both are slowed, so that neither notices much of what else the machine does: what is slept may be waited for a core too
SLOWDOWN = (6.0, 24.0)
pytestmark = pytest.mark.usefixtures("one_thread")
TRIES = 3  # one may fall into a moment when the machine is too busy even for that


def config_of(*overrides: str) -> Config:
    return config_from_dict(TREE, overrides)


def probed(world: World, overrides: list[str], slowdown: tuple[float, ...] | None = None):
    """Facts; what was said; and whether random state and gradients stayed as they were."""
    if slowdown:
        world = dataclasses.replace(world, meter=Meter(Throttle({0: slowdown[world.rank]})))
    config, said = config_of(*overrides), []
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 0.5)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    facts = probe(world, config, likely_vocab(config), build_transport(world), said.append)
    same = torch.equal(random, torch.get_rng_state()) and torch.equal(weight.grad, torch.full((3,), 0.5))
    return facts, said, same and torch.is_grad_enabled()


@pytest.mark.parametrize("more", [[], ["model.activation=gelu", "model.moe_every=2", "model.shared_experts=1",
                                       "train.accumulate=2", "model.recompute=true", "train.dtype=float64",
                                       "router.name=shared_expert"]])
def test_a_rank_slowed_four_times_is_measured_four_times_slower(more):
    for left in reversed(range(TRIES)):
        (facts, _, same), (other, _, same_there) = run_ranks(2, probed, more, SLOWDOWN)
        assert facts == other and [f.rank for f in facts] == [0, 1] and all(f.measured for f in facts)
        assert same and same_there
        ratios = [seconds(facts[1], what) / seconds(facts[0], what) for what in ("expert", "dense")]
        if left == 0 or all(2.2 < ratio < 7 for ratio in ratios):
            break
    assert 2.2 < min(ratios) and max(ratios) < 7
    for f in facts:
        assert f.alltoall_bytes_per_s > 1e6 and 0 < f.alltoall_latency_s < 1
        assert f.host_copy_bytes_per_s == 0 and 0 < f.free_bytes <= f.total_bytes
        assert (f.device, f.vendor, f.island) == ("cpu", "cpu", 0) and f.host and f.device_name


def seconds(fact: RankFacts, what: str) -> float:
    """Of about as many rows or tokens as a rank has in a step."""
    speed = fact.expert_rows_per_s if what == "expert" else fact.dense_tokens_per_s
    return getattr(fact, f"{what}_call_s") + 2048 / speed


def test_given_speeds_are_taken_and_ranks_share_the_memory_of_their_machine():
    facts, said, _ = run_ranks(2, probed, ["placement.speeds=[8,2]"])[1]
    assert [f.expert_rows_per_s for f in facts] == [8, 2] == [f.dense_tokens_per_s for f in facts]
    assert [f.expert_call_s for f in facts] == [0, 0] and not any(f.measured for f in facts) and said == []
    (alone,), _, _ = probed(World(), ["placement.speeds=[8]"])
    assert facts[0].total_bytes == pytest.approx(alone.total_bytes / 2, rel=0.01)


def test_one_speed_given_the_other_measured():
    facts, _, _ = run_ranks(2, probed, ["placement.dense_speeds=[3,1]", "placement.probe_s=0.5"])[0]
    assert [f.dense_tokens_per_s for f in facts] == [3, 1] and min(f.expert_rows_per_s for f in facts) > 100


def test_a_world_of_one_has_no_links():
    (alone,), _, same = probed(World(), ["placement.probe_s=0.5"])
    assert same and alone.alltoall_bytes_per_s == alone.alltoall_latency_s == 0
    assert alone.expert_rows_per_s > 100 and alone.dense_tokens_per_s > 10


def test_too_little_time_is_said_and_how_much_would_do():
    _, said, _ = probed(World(), ["placement.probe_s=0.001"])
    assert any("raise placement.probe_s (now 0.001)" in text and "2 only" in text for text in said)


@pytest.mark.parametrize("tokenizer, size", [("byte", 257), ("bpe", 777)])
def test_the_vocabulary_is_known_without_reading_text(tokenizer, size):
    assert likely_vocab(config_of(f"data.tokenizer={tokenizer}", "data.vocab=777")) == size


def test_the_vocabulary_of_a_tokenizer_file(tmp_path):
    from moedist.data import Tokenizer
    tokenizer = Tokenizer.train_bpe(["some text, and some more text"] * 3, 270)
    tokenizer.save(tmp_path)
    assert likely_vocab(config_of(f"data.tokenizer={tmp_path}/tokenizer.json")) == tokenizer.vocab_size


@pytest.mark.gpu
def test_an_accelerator_is_measured():
    device = torch.device(torch.accelerator.current_accelerator().type, 0)
    world = World(device=device, meter=Meter(device=device))
    for dtype in ("float32", "bfloat16"):
        (f,), _, same = probed(world, [f"train.dtype={dtype}", "model.width=256", "model.expert_hidden=512"])
        assert same and f.device == str(device) and f.host_copy_bytes_per_s > 1e8
        assert f.expert_rows_per_s > 1e3 and f.dense_tokens_per_s > 1e3
