"""Generation with a cache: the logits of whole sequences, and texts that depend on nothing but prompt and seed."""

import dataclasses

import pytest
import torch

from moedist.config import config_from_dict
from moedist.decoding import Sampling, generate_batch
from moedist.decoding.passes import CachedPasses, Sample, WholePasses
from moedist.dispatch import build_transport
from moedist.errors import ConfigError
from moedist.model import Transformer
from moedist.placement import plan_from_config
from moedist.world import World
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT, VOCAB = 12, 30
TINY = {"model": {"layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "experts": 4, "expert_hidden": 8, "ffn_hidden": 20,
                  "moe_every": 1, "init_std": 0.4}, "data": {"sequence_length": CONTEXT}}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6], [2, 7], [1, 8, 2, 8, 1, 8, 2], [4, 5]]
WARM = Sampling(max_tokens=20, temperature=1.0, top_k=0, seed=3)
FREE = ["topk", "hash", "random", "stochastic_topk", "shared_expert"]  # a token is routed by what came before it


def build(*overrides: str, world: World | None = None) -> Transformer:
    config, world = config_from_dict(TINY, overrides), world or World()
    return Transformer(config, VOCAB, plan_from_config(config, world.size), build_transport(world), torch.device("cpu"),
                       torch.float64)


def for_router(name: str) -> list[str]:
    return [f"router.name={name}", *(["model.shared_experts=1"] if name == "shared_expert" else []),
            *(["model.top_k=1"] if name == "switch" else [])]


def generate(model, prompts=PROMPTS, sampling=WARM, world=None, **more):
    return generate_batch(model, world or World(), prompts, sampling, context=CONTEXT, dtype=torch.float64, **more)


@pytest.mark.parametrize("overrides", [*(for_router(name) for name in FREE), ["model.qk_norm=all", "model.clip_qkv=2.0"],
                                       ["model.moe_every=2", "model.qk_norm=head", "model.kv_heads=4"]])
@torch.no_grad()
def test_cached_hidden_states_are_those_of_whole_sequences(overrides):
    """Sequences of different lengths that come in later, end early, and outgrow the context."""
    model = build(*overrides).eval()
    ways = [kind(model, CONTEXT, torch.device("cpu"), torch.float64) for kind in (CachedPasses, WholePasses)]
    draws = torch.Generator().manual_seed(0)
    active, slid = [[], []], 0  # of each way
    for step in range(30):
        prompts = {0: PROMPTS[:2], 4: PROMPTS[2:4], 9: PROMPTS[4:]}.get(step, [])
        fresh = [[Sample(i, list(p), len(p), draws) for i, p in enumerate(prompts)] for _ in ways]
        for way, samples in zip(ways, fresh):
            way.admit(samples)
        now = fresh if prompts else active
        torch.testing.assert_close(ways[0].hidden(now[0]), whole_hidden(ways[1], now[1]), rtol=0, atol=1e-10)
        for a, b in zip(*now):
            a.ids.append(int(torch.randint(VOCAB, (), generator=draws)))
            b.ids.append(a.ids[-1])
        active = [[*old, *new] for old, new in zip(active, fresh)]
        slid = max(slid, *(s.start for s in active[0]))
        if step in (7, 15):
            active = [samples[:1] + samples[2:] for samples in active]
            for way, samples in zip(ways, active):
                way.keep(samples)
    assert slid > CONTEXT and len(active[0]) == 4


def whole_hidden(way, samples):
    found = {id(s): h for part in way.passes(samples) for s, h in zip(part, way.hidden(part))}
    return torch.stack([found[id(s)] for s in samples])


@pytest.mark.parametrize("router", ["topk", "random", "switch", "soft_moe"])
def test_text_depends_on_prompt_and_seed_alone(router):
    """Not on what else is in the batch, its size, or a cache; routers that look across tokens do without."""
    model = build(*for_router(router))
    together = generate(model)
    assert together.timings.cached == (router in FREE)
    assert [generate(model, [p]).ids[0] for p in PROMPTS] == together.ids == generate(model, batch=2).ids
    assert generate(model, cache=False).ids == together.ids
    reseeded = generate(model, sampling=dataclasses.replace(WARM, seed=4)).ids
    assert all(a != b for a, b in zip(reseeded, together.ids))
    two = generate(model, PROMPTS[:2], dataclasses.replace(WARM, samples=2)).ids
    assert [len(of) for of in two] == [2, 2] and two[0][0] != two[0][1] and [of[:1] for of in two] == together.ids[:2]


def on_ranks(world, router, placement, sampling):
    model = build(*for_router(router), placement, world=world)
    found = generate(model, sampling=sampling, world=world, eos=7, ended=lambda ids: ids[-1] == 8)
    return found.ids, found.timings.passes, (found.timings.prefill_tokens, found.timings.decode_tokens)


@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_any_ranks_and_placement_give_the_same_text(router):
    """Sequences end early, on some ranks before others; five prompts more or less than ranks."""
    sampling = dataclasses.replace(WARM, samples=2, max_tokens=16)
    (ids, passes, tokens), = run_ranks(1, on_ranks, router, "placement.counts=[4]", sampling)
    flat = [s for of in ids for s in of]
    assert {len(s) for s in flat} != {16} and all(len(s) == 16 or s[-1] in (7, 8) for s in flat)
    assert all(7 not in s[:-1] and 8 not in s[:-1] for s in flat) and tokens[1] == sum(map(len, flat)) - len(flat)
    for ranks, placement in ((2, "placement.counts=[4,0]"), (2, "placement.owners={0: [1], 1: [3, 0, 2]}"),
                             (3, "placement.counts=[1,0,3]")):
        parts = run_ranks(ranks, on_ranks, router, placement, sampling)
        assert all(part[0] == ids and part[2] == tokens for part in parts), (ranks, placement)
        assert len({part[1] for part in parts}) == 1 and parts[0][1] <= passes


def few(world):
    model = build(world=world)
    return generate(model, [[3, 1]], dataclasses.replace(WARM, max_tokens=3), world).ids, \
        generate(model, [[3, 1]], dataclasses.replace(WARM, max_tokens=0), world).ids, generate(model, [], WARM, world).ids


def test_more_ranks_than_prompts_and_nothing_to_do():
    (alone,), parts = run_ranks(1, few), run_ranks(3, few)
    assert all(part == alone for part in parts) and len(alone[0][0][0]) == 3 and alone[1:] == ([[[]]], [])


def test_sequences_that_ended_are_not_dispatched():
    model, rows = build(), []
    model.layers[0].ffn.router.register_forward_hook(lambda _, inputs, routed: rows.append(len(inputs[0].vocab_ids_GS)))
    ends = iter([False, True, True])
    found = generate(model, PROMPTS[:2] + PROMPTS[3:4], dataclasses.replace(WARM, max_tokens=3),
                     ended=lambda ids: len(ids) == 1 and next(ends))
    assert [len(of[0]) for of in found.ids] == [3, 1, 1]
    assert rows == [5 + 1 + 2, 1, 1], "no padding among the prompts, then the one that goes on"


def test_refusals():
    model = build("router.name=expert_choice")
    with pytest.raises(ConfigError, match="looks across the tokens"):
        generate(model, cache=True)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, [[1], []])
