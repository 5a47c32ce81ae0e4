"""The measures of routers against counts by hand and plain loops."""

import itertools
import math
from collections import Counter

import pytest
import torch

from moedist.bench.routers.flops import flops_per_token
from moedist.bench.routers.measures import MEASURES, Spread, spreads, written
from moedist.bench.routers.routing import RoutingWatch, agreement, with_noise
from moedist.bench.routers.settings import BALANCED, QUICK, config_of, needs_of, parse_variant
from moedist.bench.routers.text import distinct, held_out_prompts, self_bleu, words
from moedist.bench.routers.uneven import makespan_over_bound
from moedist.config import config_from_dict
from moedist.data import EvalStream
from moedist.dispatch import build_transport
from moedist.errors import ConfigError
from moedist.model import Transformer
from moedist.monitor import chosen_pairs, expert_utilisation, load_balance
from moedist.phases.evaluation import held_out_loss
from moedist.placement import equal_layer, plan_from_config, plan_layer
from moedist.routing import Assignment
from moedist.world import World

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, LENGTH, EXPERTS = 30, 8, 4
TINY = {"model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": EXPERTS, "expert_hidden": 8,
                  "ffn_hidden": 20, "moe_every": 1, "init_std": 0.4}, "data": {"sequence_length": LENGTH}}


def build(*overrides: str) -> Transformer:
    config = config_from_dict(TINY, overrides)
    return Transformer(config, VOCAB, plan_from_config(config, 1), build_transport(World()), torch.device("cpu"),
                       torch.float64)


def stream(tokens: int = 65) -> EvalStream:
    return EvalStream(torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(0)).numpy(), LENGTH)


def watched(model: Transformer, noise: float | None = None, seed: int = 0) -> RoutingWatch:
    with RoutingWatch(model, noise) as watch:
        held_out_loss(model, stream(), World(), torch.float64, 4, seed=seed)
    return watch


def test_balance_and_utilisation():
    loads = torch.tensor([6, 2, 4, 0])
    assert load_balance(loads) == 3 / 6 and load_balance(torch.tensor([5, 5])) == 1
    shares = [6 / 12, 2 / 12, 4 / 12]
    assert expert_utilisation(loads) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)) / 4)
    assert expert_utilisation(torch.tensor([7, 7, 7])) == pytest.approx(1)
    one = torch.tensor([0, 9, 0])
    assert load_balance(one) == pytest.approx(1 / 3) and expert_utilisation(one) == pytest.approx(1 / 3)
    assert load_balance(torch.zeros(3)) == expert_utilisation(torch.zeros(3)) == 0


def test_loads_and_pairs_are_those_of_the_routers():
    model = build("router.name=topk", "model.top_k=2").eval()
    seen = []
    for i, moe in model.moe_layers():
        moe.router.register_forward_hook(lambda _, inputs, routed, i=i: seen.append((i, routed)))
    watch = watched(model)
    for layer in (0, 1):
        counts = Counter(e for i, routed in seen if i == layer for e in routed.expert_ids_N.tolist())
        assert watch.loads[layer].tolist() == [counts[e] for e in range(EXPERTS)]
        first = next(routed for i, routed in seen if i == layer)  # of 4 sequences
        pairs = {t * EXPERTS + e for t, e in zip(first.token_ids_N.tolist(), first.expert_ids_N.tolist())}
        assert set(watch.pairs[layer, 0].tolist()) == pairs and len(pairs) == 4 * LENGTH * 2
    before = len(seen)
    model.train()
    held_out_loss(model, stream(), World(), torch.float64, 4)
    assert len(seen) == before + 4 and watch.loads[0].sum() == 64 * 2, "the hooks are gone"


def test_capacity_drops_are_counted():
    model = build("router.name=switch", "model.top_k=1", "router.capacity_factor=0.5").eval()
    watch = watched(model)
    assert watch.wanted == 64 * 2 and 0 < watch.dropped < watch.wanted
    assert watch.dropped == 64 * 2 - sum(float(load.sum()) for load in watch.loads.values())


def test_agreement_by_hand():
    before = {(0, 0): torch.tensor([0, 1, 4, 6]), (1, 0): torch.tensor([0, 5])}
    after = {(0, 0): torch.tensor([0, 1, 4, 7]), (1, 0): torch.tensor([0, 2, 5, 7])}
    assert agreement(before, after) == pytest.approx((3 / 4 + 2 * 2 / 6) / 2)
    assert agreement(before, after) == agreement(after, before) and agreement(before, before) == 1


def test_noise_has_its_size_and_routers_differ_in_what_it_does():
    x = torch.randn(4, 50, 64, dtype=torch.float64) * torch.rand(4, 50, 1, dtype=torch.float64)
    relative = (with_noise(x, 0.05, 1) - x).norm(dim=-1) / x.norm(dim=-1)
    assert relative.mean() == pytest.approx(0.05, rel=0.02) and relative.std() < 0.01
    assert torch.equal(with_noise(x, 0.05, 1), with_noise(x, 0.05, 1))
    topk, by_hash = build(), build("router.name=hash")
    little, much = (agreement((w := watched(topk, noise)).pairs, w.noisy) for noise in (0.02, 1.0))
    assert 1 > little > much > 0.3
    assert agreement((w := watched(by_hash, 1.0)).pairs, w.noisy) == 1


def test_what_is_drawn_at_random_is_drawn_anew():
    model = build("router.name=random")
    assert agreement(watched(model, seed=1).pairs, watched(model, seed=1).pairs) == 1
    assert agreement(watched(model, seed=1).pairs, watched(model, seed=2).pairs) < 0.75  # K / E is 0.5


def test_soft_pairs_are_the_experts_that_a_token_reads_most_from():
    mix_out = torch.tensor([[[0.4, 0.1, 0.2, 0.3, 0.0, 0.0], [0.0, 0.1, 0.1, 0.1, 0.3, 0.4]]])
    rows = torch.arange(6)
    routed = Assignment(rows, rows // 2, torch.ones(6), torch.full((3,), 2), mix_out=mix_out)  # 2 tokens, 3 experts of 2 slots
    assert chosen_pairs(routed, 3, 1).tolist() == [0, 3 + 2]  # slots summed: 0.5, 0.5 (the first), 0; 0.1, 0.2, 0.7
    assert chosen_pairs(routed, 3, 2).tolist() == [0, 1, 3 + 1, 3 + 2]
    empty = Assignment(rows[:0], rows[:0], torch.ones(0), torch.zeros(3), mix_out=mix_out[:0])
    assert chosen_pairs(empty, 3, 2).tolist() == []


@pytest.mark.parametrize("overrides", [["model.top_k=3"], ["router.name=shared_expert", "model.shared_experts=2"],
                                       ["model.dense_blocks=[0]"]])
def test_flops_by_hand(overrides):
    model, m = build(*overrides), config_from_dict(TINY, overrides).model
    found = flops_per_token(model, stream(), World(), torch.float64, 4)
    d, f, h, j, c = m.width, m.expert_hidden, m.heads, m.kv_heads, m.head
    attention = 2 * d * (h + 2 * j) * c + 2 * h * c * d + 2 * 2 * LENGTH * h * c  # q, k, v; out; scores and values
    routed = m.top_k * 2 * 3 * d * f
    moe = 2 * d * EXPERTS + routed + (2 * 3 * d * f * m.shared_experts + 2 * d if m.shared_experts else 0)
    dense = 2 * 3 * d * m.ffn_hidden
    layers = [dense if i in m.dense_blocks else moe for i in range(2)]
    assert found.total == 2 * attention + sum(layers) + 2 * d * VOCAB
    assert found.experts == routed * (2 - len(m.dense_blocks)) and found.rows == m.top_k


def test_makespan_on_uneven_ranks_by_brute_force():
    trained = {0: torch.tensor([8.0, 4.0, 2.0, 2.0, 0.0]), 1: torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0])}
    met = {0: torch.tensor([2.0, 6.0, 2.0, 6.0, 1.0]), 1: torch.tensor([1.0, 2.0, 1.0, 1.0, 9.0])}
    speeds = (4, 2, 1, 1)

    def span(loads, owners):
        return max(sum(n for n, o in zip(loads, owners) if o == r) / s for r, s in enumerate(speeds))

    bounds = sum(float(load.sum()) for load in met.values()) / 8
    equal = sum(span(load.tolist(), (0, 0, 1, 2, 3)) for load in met.values()) / bounds
    assert makespan_over_bound(equal_layer, trained, met) == pytest.approx(equal)
    # what the best placements for the loads of training make of those that came
    best = 0.0
    for layer in met:
        spans = {owners: span(trained[layer].tolist(), owners) for owners in itertools.product(range(4), repeat=5)}
        least = min(spans.values())
        best += min(span(met[layer].tolist(), owners) for owners, of in spans.items() if of <= least + 1e-9)
    planned = makespan_over_bound(plan_layer, trained, met)
    assert best / bounds - 1e-9 <= planned < equal
    assert makespan_over_bound(plan_layer, met, met) < planned


def test_distinct_and_self_bleu():
    texts = [words("a b a b"), words("a b c")]
    assert texts == [["a", "b", "a", "b"], ["a", "b", "c"]] and words("f(x)") == ["f", "(", "x", ")"]
    assert distinct(texts, 1) == 3 / 7 and distinct(texts, 2) == 3 / 5 and distinct(texts, 3) == 3 / 3
    assert distinct([], 1) == 0
    alike = ["abcde", "abcde", "fghij"]  # two copies, and one that shares no letter
    assert self_bleu([list(text) for text in alike]) == pytest.approx(2 / 3)
    some = ["abcdefg", "xbcdeyz", "abcxx"]
    assert self_bleu([list(text) for text in some] + [[]]) == pytest.approx(sum(
        bleu(text, some[:i] + some[i + 1:]) for i, text in enumerate(some)) / 3)
    assert math.isnan(self_bleu([["a"], []]))


def bleu(text: str, others: list[str]) -> float:
    """BLEU-4 of a string's letters by Papineni et al. 2002, 0.1 for no match (smoothing 1 of Chen and Cherry 2014)."""
    logs = 0.0
    for n in (1, 2, 3, 4):
        counts = [Counter(t[i:i + n] for i in range(len(t) - n + 1)) for t in (text, *others)]
        matches = sum(min(count, max(other[gram] for other in counts[1:])) for gram, count in counts[0].items())
        logs += math.log((matches or 0.1) / sum(counts[0].values())) / 4
    nearest = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
    return math.exp(logs + min(0.0, 1 - nearest / len(text)))


def test_prompts_are_spread_over_the_held_out_text():
    held_out = stream(161)
    starts = [held_out.batch(i, 1)[0][0, :3].tolist() for i in (0, 5, 10, 15)]
    assert held_out_prompts(held_out, 4, 3) == starts


def test_spreads_and_how_they_are_written():
    found = spreads([{"ppl": 10.0, "flops_per_token": 2e6}, {"ppl": 12.0, "flops_per_token": 2e6}])
    assert found["ppl"] == Spread(11.0, pytest.approx(2**0.5), 2)
    assert written("ppl", found["ppl"]) == "11.00 ± 1.41" and written("flops_per_token", Spread(2e6, 0, 1)) == "2.00"
    assert all(measure.text and (measure.form or not measure.head) for measure in MEASURES.values())


def test_variants():
    assert parse_variant(BALANCED) == ("topk", ["router.bias_rate=0.01", "router.bias_rule=proportional", "router.balance_loss=0"])
    config = config_of(QUICK, "shared_expert+model.top_k=3+z_loss=0.5", 2, "x", ["model.width=32"])
    assert (config.router.name, config.model.shared_experts, config.model.top_k, config.router.z_loss, config.seed,
            config.model.width, config.phases) == ("shared_expert", 1, 3, 0.5, 2, 32, [{"train": QUICK.steps}])
    assert parse_variant("hash+rounds=3") == ("hash", ["router.options.rounds=3"])
    finer = needs_of("deepseek_moe", config_from_dict(TINY, ["model.top_k=2"]))  # 3 of 8 and a shared one, of half the width
    assert finer == ["model.shared_experts=1", "model.experts=8", "model.top_k=3", "model.expert_hidden=4"]
    assert config_of(QUICK, "switch+model.top_k=2", 0, "x").model.top_k == 2, "options have the last word"
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        parse_variant("topkk")
    with pytest.raises(ConfigError, match="KEY=VALUE, not 'bias_rate'"):
        parse_variant("topk+bias_rate")
