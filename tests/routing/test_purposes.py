"""What each of the later routers is for, as a property."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.config import check_config, config_from_dict
from moedist.errors import ConfigError
from moedist.routing import ROUTERS, RouterInput, check_router
from moedist.routing.comet import leaf_reach, nearest_permutations, smooth_step
from moedist.routing.dynmole import tsallis_entropy
from moedist.routing.losses import sequence_balance_loss_sum
from moedist.routing.progressive import experts_at
from moedist.routing.sinkhorn import transport_plan
from moedist.world import World
from tests.moe_cases import Case, build_layer
from tests.routing.test_routers import E, G, S, inputs, router

T = G * S


def experts_of(a) -> list[set[int]]:
    """Of each token."""
    found = [set() for _ in range(T)]
    for t, e in zip(a.token_ids_N.tolist(), a.expert_ids_N.tolist()):
        found[t].add(e)
    return found


def logits(r) -> torch.Tensor:
    return (inputs().x_GSD.flatten(0, 1) @ r.weight.t()).detach()


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.8])
def test_top_p_takes_the_smallest_set_that_reaches_it(threshold):
    r = router("top_p", options={"threshold": threshold})
    for experts, probs in zip(experts_of(r(inputs())), logits(r).softmax(-1).tolist()):
        taken = sorted(probs[e] for e in experts)
        others = [p for e, p in enumerate(probs) if e not in experts]
        assert sum(taken) >= threshold > sum(taken[1:]) and taken[0] >= max(others, default=0)


def test_top_p_sends_sure_tokens_to_fewer_experts_and_its_loss_is_the_entropy():
    unsure, sure = (router("top_p", options={"threshold": 0.6}) for _ in range(2))
    with torch.no_grad():
        sure.weight *= 4
        unsure.weight *= 0.1
    a, b = unsure(inputs()), sure(inputs())
    assert len(b.token_ids_N) < len(a.token_ids_N) / 1.5 and b.aux_losses["entropy_loss"] < a.aux_losses["entropy_loss"] / 1.5
    probs = logits(sure).softmax(-1)
    torch.testing.assert_close(b.aux_losses["entropy_loss"].detach(), -(probs * probs.log()).sum())
    assert sure.loss_weights()["entropy_loss"] == 1e-4


def test_rows_for_null_experts_are_not_sent():
    r = router("null_experts", options={"null_experts": 3})
    assert r.choices == 3  # 2 * 9 / 6
    a, best = r(inputs()), logits(r).topk(3).indices.tolist()
    assert experts_of(a) == [{e for e in row if e < E} for row in best]
    assert int(a.demand_E.sum()) == len(a.token_ids_N) < 3 * T
    with torch.no_grad():
        r.weight[E:] += 20 * inputs().x_GSD[0, 0]  # this token wants nothing but null experts
    assert 0 not in r(inputs()).token_ids_N.tolist()


def test_null_experts_are_alike_to_the_balance_loss_and_leave_k_where_loads_are():
    r = router("null_experts", options={"null_experts": E})
    before = r(inputs())
    with torch.no_grad():
        r.weight[E:] = r.weight[E:].roll(1, 0)
    after = r(inputs())
    assert torch.equal(before.expert_ids_N, after.expert_ids_N)
    torch.testing.assert_close(before.aux_losses["balance_loss"], after.aux_losses["balance_loss"])
    with torch.no_grad():
        r.weight.copy_(r.weight.roll(E, 0))  # as much is chosen of the others: the mean of both is K
    assert len(before.token_ids_N) + len(r(inputs()).token_ids_N) == 2 * T * r.expected_rows_per_token()


def test_deepseek_moe_adds_shared_experts_as_they_are_and_keeps_probabilities():
    layer, _ = build_layer(World(), Case((0,) * 4, (2,), "deepseek_moe", shared=3))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given_ = RouterInput(x, torch.zeros(2, 6, dtype=torch.int64), torch.arange(12).view(2, 6), 0, True)
    a = layer.router(given_)
    probs = (x.flatten(0, 1) @ layer.router.weight.t()).softmax(-1)
    torch.testing.assert_close(a.weights_N, probs.topk(2).values.flatten())
    with_shared, shared = layer(given_)[0], layer.shared(x)
    layer.shared = None
    torch.testing.assert_close(with_shared, layer(given_)[0] + shared)


@pytest.mark.parametrize("name", ["loss_free", "group_limited"])
def test_sigmoid_bias_evens_out_loads_and_does_not_weigh(name):
    r = router(name, options={"update_rate": 0.01} | ({"groups": 3, "top_groups": 2} if name == "group_limited" else {}))
    x, loads = inputs().x_GSD + 0.7 * r.weight[0].detach(), []  # a batch that likes expert 0
    for _ in range(300):
        loads.append(r(inputs(x=x)).demand_E)
        r.after_step(loads[-1])
    spread = [(load.max() - load.min()).item() for load in (loads[0], loads[-1])]
    assert spread[0] > 10 and spread[1] <= spread[0] / 2
    a = r(inputs())
    chosen = logits(r).sigmoid().gather(1, a.expert_ids_N.view(-1, 2))
    torch.testing.assert_close(a.weights_N.detach().view(-1, 2), chosen / chosen.sum(-1, keepdim=True))
    assert a.prob_sum_E is None and "balance_loss" not in a.aux_losses


def test_the_sequence_loss_is_one_a_token_when_balanced_and_more_when_not():
    even = torch.eye(E).repeat(2, 1)[None]  # a sequence in which every expert has two tokens
    assert sequence_balance_loss_sum(even, even).item() / (2 * E) == pytest.approx(1)
    one = torch.zeros(1, 2 * E, E).index_fill(2, torch.tensor([0]), 1.0)
    assert sequence_balance_loss_sum(one, one).item() / (2 * E) == pytest.approx(E)
    # a batch that is balanced only as a whole is not
    assert sequence_balance_loss_sum(torch.eye(E)[:, None], torch.eye(E)[:, None]).item() / E == pytest.approx(E)


@pytest.mark.parametrize("groups, top_k", [(2, 2), (3, 3), (2, 4), (1, 2)])
def test_every_group_has_the_same_rows_of_every_token(groups, top_k):
    r = router("grouped", top_k, options={"groups": groups})
    for experts in experts_of(r(inputs())):
        assert [sum(e * groups // E == g for e in experts) for g in range(groups)] == [top_k // groups] * groups


def test_group_limited_takes_the_best_of_the_groups_with_the_best_two():
    r = router("group_limited", options={"groups": 3, "top_groups": 2})
    r.bias[1] = 0.3
    for experts, scores in zip(experts_of(r(inputs())), (logits(r).sigmoid() + r.bias).tolist()):
        sums = [scores[2 * g] + scores[2 * g + 1] for g in range(3)]
        open_ = [e for e in range(E) if sums[e // 2] > min(sums)]
        assert experts == set(sorted(open_, key=lambda e: -scores[e])[:2])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))
def test_a_transport_plan_has_the_sums_that_it_must(experts, tokens, seed):
    plan = transport_plan(torch.randn(2, tokens, experts, generator=torch.Generator().manual_seed(seed)).double(), 60)
    torch.testing.assert_close(plan.sum(2), torch.ones(2, tokens).double())
    torch.testing.assert_close(plan.sum(1), torch.full((2, experts), tokens / experts).double(), rtol=1e-3, atol=1e-3)


def test_sinkhorn_evens_out_loads_in_its_share_of_steps_and_never_in_evaluation():
    r = router("sinkhorn", options={"fraction": 0.25})
    x = inputs().x_GSD + 0.7 * r.weight[0].detach()
    plain = r(inputs(training=False, x=x))
    runs = [r(inputs(seed, x=x)) for seed in range(200)]
    balanced = [a for a in runs if not torch.equal(a.weights_N, plain.weights_N)]
    assert 30 <= len(balanced) <= 70
    spread = [int(a.demand_E.max() - a.demand_E.min()) for a in (plain, balanced[0])]
    assert spread[1] <= spread[0] / 2
    assert all(torch.equal(r(inputs(seed, training=False, x=x)).weights_N, plain.weights_N) for seed in range(200))


@pytest.mark.parametrize("leaves", range(1, 10))
def test_a_tree_gives_each_token_away_as_a_whole(leaves):
    splits = torch.rand(5, 2, max(leaves - 1, 1), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    reach = leaf_reach(splits, leaves)
    assert reach.shape == (5, 2, leaves)
    torch.testing.assert_close(reach.sum(2), torch.ones(5, 2).double())
    hard = leaf_reach(splits.round(), leaves)
    assert bool(((hard == 1).sum(2) == 1).all())


def test_a_smooth_step_is_exact_beyond_gamma():
    x = torch.tensor([-9, -0.5, 0, 0.25, 0.5, 9], dtype=torch.float64)
    torch.testing.assert_close(smooth_step(x, 1.0), torch.tensor([0, 0, 0.5, 0.84375, 1, 1], dtype=torch.float64))


def test_hard_trees_send_a_token_to_k_experts_at_most():
    r = router("comet", options={"permutation_steps": 0})
    soft = len(r(inputs()).token_ids_N)
    with torch.no_grad():
        r.split_weight *= 100
    assert len(r(inputs()).token_ids_N) <= 2 * T < soft


def test_the_search_finds_the_places_of_experts_that_lower_the_loss():
    """Tokens are to go where a router with other places sends them: leaves are given, only places are learned."""
    r = router("comet", options={"permutation_steps": 60})
    wanted = torch.tensor([[3, 1, 5, 0, 2, 4], [2, 0, 1, 4, 5, 3]])
    target = router("comet", options={"permutation_steps": 0})
    target.permutation.copy_(wanted)
    goal = dense(target(inputs())).detach()
    with torch.no_grad():
        r.place_logits *= 0.02  # as models initialise it
    before = (dense(router("comet", options={"permutation_steps": 0})(inputs())) - goal).square().sum()
    optimizer = torch.optim.Adam([r.place_logits], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (dense(r(inputs())) - goal).square().sum().backward()
        optimizer.step()
        r.after_step(torch.zeros(E))
    for places in r.permutation.tolist():
        assert sorted(places) == list(range(E))
    found = (dense(r(inputs())) - goal).square().sum()
    assert found < before / 5, "experts are where they should be, or nearly"
    assert torch.equal(nearest_permutations(torch.eye(E)[None]), torch.arange(E)[None])


def dense(a) -> torch.Tensor:
    """[T, E] weights."""
    return torch.zeros(T, E, dtype=torch.float64).index_put((a.token_ids_N, a.expert_ids_N), a.weights_N)


def test_dynmole_asks_all_experts_where_it_is_unsure_only():
    r = router("dynmole", options={"threshold": 0.8, "top_p": 0.7})
    probs = logits(r).softmax(-1)
    entropy = tsallis_entropy(probs, 1.1)
    assert 0 < int((entropy >= 0.8).sum()) < T
    for experts, p, unsure in zip(experts_of(r(inputs())), probs.tolist(), (entropy >= 0.8).tolist()):
        best = sorted(range(E), key=lambda e: -p[e])
        n = next(n for n in range(1, E + 1) if sum(p[e] for e in best[:n]) >= 0.7)
        assert experts == set(range(E) if unsure else best[:max(n, 2)])


def test_tsallis_entropy_is_the_usual_one_at_one_and_largest_where_all_are_alike():
    probs = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(tsallis_entropy(probs, 1.0), -(probs * probs.log()).sum(-1))
    torch.testing.assert_close(tsallis_entropy(probs, 1 + 1e-7), tsallis_entropy(probs, 1.0), atol=1e-6, rtol=0)
    assert tsallis_entropy(probs, 1.1)[1].item() == pytest.approx((1 - 3**-0.1) / 0.1)
    assert tsallis_entropy(probs, 2.0).diff() > 0


def test_progressive_falls_from_all_experts_to_k_and_is_then_topk():
    r = router("progressive", options={"steps": 8})
    seen = []
    for _ in range(10):
        seen.append(len(r(inputs()).token_ids_N) // T)
        r.after_step(torch.zeros(E))
    assert seen == [6, 6, 5, 5, 4, 4, 3, 3, 2, 2] and r.state_dict()["steps"] == 10
    plain = router("topk")
    plain.load_state_dict({"weight": r.weight, "bias": r.bias})
    a, b = r(inputs()), plain(inputs())
    assert torch.equal(a.expert_ids_N, b.expert_ids_N) and torch.equal(a.weights_N, b.weights_N)
    assert experts_at(0, 8, 2, 100) == 8 and experts_at(99, 8, 2, 100) == 3 and experts_at(10**9, 8, 2, 100) == 2


def test_sigma_moe_drops_experts_in_training_only_and_wants_even_sequences():
    r = router("sigma_moe", options={"expert_dropout": 0.5})
    best = [set(row) for row in logits(r).topk(2).indices.tolist()]
    assert experts_of(r(inputs(training=False))) == best
    trained = [experts_of(r(inputs(seed))) for seed in range(100)]
    kept = sum(experts == wanted for run in trained for experts, wanted in zip(run, best)) / (100 * T)
    assert kept == pytest.approx(0.25 + 3 / 64, abs=0.04)  # both are open; or one, and no other; or none at all
    assert all(len(experts) == 2 for run in trained for experts in run)
    even, one = (router("sigma_moe") for _ in range(2))
    with torch.no_grad():
        even.weight *= 0
        one.weight[0] += 20 * inputs().x_GSD[0].mean(0)
    assert even(inputs()).aux_losses["entropy_loss"].item() == pytest.approx(-T * math.log(E))
    assert one(inputs()).aux_losses["entropy_loss"] > even(inputs()).aux_losses["entropy_loss"] + 1


@pytest.mark.parametrize("name, options, words", [
    ("top_p", {"threshold": 0.0}, "threshold is 0"), ("null_experts", {"null_experts": -1}, "null_experts is -1"),
    ("loss_free", {"update_rate": -1.0}, "update_rate is -1"), ("grouped", {"groups": 5}, "groups is 5.*1, 2, 4, 8"),
    ("grouped", {"groups": 4}, "groups is 4.*2 experts"), ("group_limited", {"groups": 8, "top_groups": 1}, "between 2 and 8"),
    ("sinkhorn", {"fraction": 2.0}, "fraction is 2"), ("comet", {"gamma": 0.0}, "gamma is 0"),
    ("dynmole", {"top_p": 1.5}, "top_p 1.5"), ("progressive", {"start": 9}, "start is 9.*2.*8"),
    ("sigma_moe", {"expert_dropout": 1.0}, "expert_dropout 1"), ("top_p", {"threshold": "much"}, "such as 0.4")])
def test_options_that_cannot_be_are_refused_with_the_numbers(name, options, words):
    with pytest.raises(ConfigError, match=words):
        check_router(config_from_dict({"router": {"name": name, "options": options}}))


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_goes_with_the_default_model(name):
    shared = {"shared_experts": int(name in ("shared_expert", "deepseek_moe")), "pool_layers": 2 if name == "rexmoe" else 1}
    config = config_from_dict({"router": {"name": name}, "model": shared | ({"top_k": 1} if name == "switch" else {})})
    check_config(config, 1)
    check_router(config)
    assert dataclasses.is_dataclass(ROUTERS[name].Options) and ROUTERS[name].__doc__


@pytest.mark.parametrize("router, words", [({"name": "deepseek_moe"}, "shared_experts"),
                                           ({"name": "loss_free", "bias_rate": 0.1}, "update_rate in router.options")])
def test_combinations_that_cannot_be_are_refused(router, words):
    with pytest.raises(ConfigError, match=words):
        check_config(config_from_dict({"router": router}), 1)
