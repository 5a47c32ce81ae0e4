"""What every router promises, and what each is for."""

import dataclasses
import itertools

import pytest
import torch

from moedist.config import RouterConfig
from moedist.errors import ConfigError
from moedist.model.initialise import fill_normal
from moedist.routing import ROUTERS, RouterInput, balance_loss_sum, build_router, describe_options
from moedist.routing.base import even_share, within_capacity
from moedist.routing.comet import NOTHING
from moedist.routing.noise import hash_int, mix_seeds, normal, uniform
from tests.routing.settings import fitting_options

G, S, D, E = 3, 8, 6, 6


def router(name: str, top_k: int = 2, **config):
    top_k = 1 if name == "switch" else top_k
    config.setdefault("options", fitting_options(name, E, top_k))
    made = build_router(D, E, top_k, RouterConfig(name=name, **config), S).double()
    for n, p in made.named_parameters():
        fill_normal(p, 1.0, 0, n)
    return made


def inputs(seed: int = 0, training: bool = True, x: torch.Tensor | None = None) -> RouterInput:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(G, S, D, generator=generator, dtype=torch.float64) if x is None else x
    ids = torch.randint(0, 20, (G, S), generator=generator)
    return RouterInput(x, ids, torch.arange(G * S).view(G, S), seed, training)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_assignment_is_valid(name):
    a = router(name)(inputs())
    n = len(a.token_ids_N)
    assert a.token_ids_N.dtype == a.expert_ids_N.dtype == torch.int64
    assert len(a.expert_ids_N) == len(a.weights_N) == n > 0
    assert bool((a.token_ids_N.diff() >= 0).all()), "token ids must ascend"
    sources = G * S if a.mix_in is None else a.mix_in.shape[0] * a.mix_in.shape[1]
    assert 0 <= a.token_ids_N.min() and a.token_ids_N.max() < sources
    assert 0 <= a.expert_ids_N.min() and a.expert_ids_N.max() < E
    pairs = set(zip(a.token_ids_N.tolist(), a.expert_ids_N.tolist()))
    assert len(pairs) == n, "no token goes to one expert twice"
    assert a.demand_E.shape == (E + router(name).free_experts,) and int(a.demand_E.sum()) >= n
    assert bool((a.weights_N > 0).all()) and bool((a.weights_N <= 1 + 1e-9).all())


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_empty_batch(name, capacity_factor):
    empty = RouterInput(torch.zeros(0, S, D, dtype=torch.float64), torch.zeros(0, S, dtype=torch.int64),
                        torch.zeros(0, S, dtype=torch.int64), 0, True)
    a = router(name, capacity_factor=capacity_factor)(empty)
    assert len(a.token_ids_N) == 0 and int(a.demand_E.sum()) == 0


@pytest.mark.parametrize("name, bias", [*((name, {}) for name in sorted(set(ROUTERS) - {"random", "hash", "thor"})),
                                        ("topk", {"bias_rate": 0.1, "bias_in": "logits"})])
def test_gradients_match_finite_differences(name, bias, one_thread):
    r = router(name, **bias)
    if bias:
        r.bias.copy_(torch.linspace(-1, 1, E))
    x = inputs().x_GSD[:2, :5].clone().requires_grad_()
    ids, keys = torch.zeros(2, 5, dtype=torch.int64), torch.arange(10).view(2, 5)

    def outputs(x, *_):
        a = r(RouterInput(x, ids, keys, 0, True))
        found = [a.weights_N, *a.aux_losses.values(), a.prob_sum_E, a.mix_in, a.mix_out, a.shared_gate_T1, a.direct_TD,
                 a.carried]
        return tuple(v for v in found if v is not None and v.requires_grad)

    assert torch.autograd.gradcheck(outputs, (x, *r.parameters()), atol=1e-6)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_low_precision_changes_no_route(name):
    r, i = router(name, **({"options": {"permutation_steps": 9}} if name == "comet" else {})).float(), inputs()
    i = dataclasses.replace(i, x_GSD=i.x_GSD.float())
    plain = r(i)
    with torch.autocast("cpu", torch.bfloat16):
        low = r(i)
    assert low.weights_N.dtype == torch.float32 and torch.equal(low.weights_N, plain.weights_N)
    assert torch.equal(low.expert_ids_N, plain.expert_ids_N)
    for loss, expected in zip(low.aux_losses.values(), plain.aux_losses.values()):
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_unknown_options_are_refused_with_what_there_is(name):
    with pytest.raises(ConfigError, match=f"'no_such'.*router {name} has not"):
        router(name, options={"no_such": 1})
    for f in dataclasses.fields(ROUTERS[name].Options):
        assert f"{name}: {f.name}=" in describe_options() and f.metadata["help"]


SCALED = ["topk", "shared_expert", "stochastic_topk", "null_experts", "loss_free", "grouped", "group_limited", "sinkhorn",
          "comet", "dynmole", "progressive"]  # weights of a token sum to one; those of all others are theirs as they are


@pytest.mark.parametrize("name", SCALED)
def test_weights_sum_to_one_per_token(name):
    a = router(name)(inputs())
    sums = torch.zeros(G * S, dtype=torch.float64).index_add_(0, a.token_ids_N, a.weights_N.detach())
    some = torch.isin(torch.arange(G * S), a.token_ids_N)
    assert bool(some.all()) or name == "null_experts"
    torch.testing.assert_close(sums, some.double(), atol=E * NOTHING if name == "comet" else 1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_rows_stay_within_what_planning_reckons_with(name):
    r = router(name)
    for training in (True, False):
        rows = len(r(inputs(training=training)).token_ids_N) / (G * S)
        assert rows <= r.most_rows_per_token() and 0 < r.expected_rows_per_token() <= r.most_rows_per_token()


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"expert_choice", "soft_moe"}))
def test_capacity_is_kept_in_every_sequence(name):
    r = router(name, capacity_factor=0.5)
    a = r(inputs())
    assert len(a.token_ids_N) + int(a.stats["dropped_rows"]) == int(a.demand_E[:E].sum())  # of those that compute
    per_sequence = torch.zeros(G, E).index_put_((a.token_ids_N // S, a.expert_ids_N), torch.ones(len(a.token_ids_N)), True)
    rows = {"progressive": E, "switch": 1}.get(name, 2)
    assert per_sequence.max() <= even_share(S, rows, E, 0.5) and int(a.stats["dropped_rows"]) > 0


def test_topk_takes_the_best_and_switch_keeps_the_probability():
    r = router("topk")
    x = inputs().x_GSD.flatten(0, 1)
    probs = (x @ r.weight.t()).softmax(-1)
    a = r(inputs())
    expected = probs.topk(2).indices.sort(-1).values
    assert torch.equal(a.expert_ids_N.view(-1, 2).sort(-1).values, expected)
    s = router("switch", capacity_factor=0.0)
    a = s(inputs())
    torch.testing.assert_close(a.weights_N, (x @ s.weight.t()).softmax(-1).max(-1).values)


def test_noise_is_off_in_evaluation_and_changes_with_the_seed():
    r = router("stochastic_topk")
    noisy = [r(inputs(seed)).weights_N for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    quiet = [r(inputs(seed, training=False)).weights_N for seed in (0, 1)]
    assert torch.equal(*quiet)


def test_random_draws_different_experts_every_step_and_all_of_them():
    r = router("random")
    drawn = [r(inputs(seed)).expert_ids_N for seed in range(20)]
    assert not torch.equal(drawn[0], drawn[1])
    counts = torch.bincount(torch.cat(drawn), minlength=E).double()
    assert counts.min() / counts.mean() > 0.85


def test_hash_sends_a_word_to_the_same_experts_everywhere():
    r, words = router("hash"), {}
    i = inputs()
    a = r(i)
    for word, experts in zip(i.vocab_ids_GS.flatten().tolist(), a.expert_ids_N.view(-1, 2).tolist()):
        assert words.setdefault(word, experts) == experts


def test_expert_choice_gives_every_expert_the_same_load_in_every_sequence():
    a = router("expert_choice")(inputs())
    per_sequence = torch.zeros(G, E).index_put_((a.token_ids_N // S, a.expert_ids_N), torch.ones(len(a.token_ids_N)), True)
    assert bool((per_sequence == 3).all())  # ceil(8 tokens * 2 / 6 experts)


def test_soft_moe_mixes_within_the_sequence_and_sums_to_one():
    r = router("soft_moe")
    a = r(inputs())
    torch.testing.assert_close(a.mix_in.sum(-1), torch.ones_like(a.mix_in[..., 0]))
    torch.testing.assert_close(a.mix_out.sum(-1), torch.ones_like(a.mix_out[..., 0]))
    assert r.slots == 3 and not r.causal and router("topk").causal


def test_capacity_serves_first_choices_first_and_counts_what_it_drops():
    experts_GSK = torch.tensor([[[0, 1], [0, 2], [1, 0], [0, 1]]])
    keep = within_capacity(experts_GSK, 3, 2)
    assert keep.tolist() == [[[True, True], [True, True], [True, False], [False, False]]]
    a = router("topk", capacity_factor=0.5)(inputs())
    assert len(a.token_ids_N) + int(a.stats["dropped_rows"]) == G * S * 2 == int(a.demand_E.sum())
    for g, e in itertools.product(range(G), range(E)):
        assert int(((a.token_ids_N // S == g) & (a.expert_ids_N == e)).sum()) <= 2  # ceil(0.5 * 8 * 2 / 6)


def test_balance_loss_is_one_when_balanced_and_counts_all_ranks():
    tokens, probs = 100, torch.full((E,), 100 / E)
    assert balance_loss_sum(probs, torch.full((E,), 40)).item() / tokens == pytest.approx(1)
    skewed = torch.tensor([100.0, 0, 0, 0, 0, 0])
    assert balance_loss_sum(skewed, torch.tensor([200, 0, 0, 0, 0, 0])).item() / tokens == pytest.approx(E)
    assert balance_loss_sum(probs, torch.zeros(E, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize("where, rate", [("choice", 0.01), ("logits", 0.05)])
def test_bias_evens_out_loads(where, rate):
    r = router("topk", bias_rate=rate, bias_in=where)
    x = inputs().x_GSD + 0.7 * r.weight[0].detach()  # a batch that likes expert 0
    loads = []
    for _ in range(300):
        loads.append(r(inputs(x=x)).demand_E)
        r.after_step(loads[-1])
    spread = [(load.max() - load.min()).item() for load in (loads[0], loads[-1])]
    assert spread[0] > 10 and spread[1] <= spread[0] / 2
    # the weights come from the unbiased scores, or those with the bias
    logits = inputs().x_GSD.flatten(0, 1) @ r.weight.t()
    probs = (logits + r.bias if where == "logits" else logits).softmax(-1)
    a = r(inputs())
    chosen = probs.gather(1, a.expert_ids_N.view(-1, 2))
    torch.testing.assert_close(a.weights_N.view(-1, 2), chosen / chosen.sum(-1, keepdim=True))


def test_the_largest_and_the_smallest_draw_are_finite(monkeypatch):
    """Of 24 bits that are all ones or all zeros; a training of millions of tokens meets them."""
    for bits in (-1, 0):
        monkeypatch.setattr("moedist.routing.noise.hash_int", lambda keys, seed, bits=bits: torch.full_like(
            keys, ((1 << 63) - 1) & bits))
        for dtype in (torch.float32, torch.float64):
            u, n = uniform(torch.arange(3), 2, 0, dtype), normal(torch.arange(3), 2, 0, dtype)
            assert 0 < u.min() and u.max() < 1 and bool(n.isfinite().all()) and 5 < n.abs().max() < 6


def test_noise_has_the_right_distribution_and_depends_on_every_argument():
    keys = torch.arange(20_000)
    u, n = uniform(keys, 4, 1), normal(keys, 4, 1, torch.float64)
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert abs(n.mean()) < 0.02 and abs(n.std() - 1) < 0.02
    assert abs(torch.corrcoef(u.t())[0, 1]) < 0.02
    assert not torch.equal(u, uniform(keys, 4, 2)) and torch.equal(u[5:], uniform(keys[5:], 4, 1))
    assert len(hash_int(keys, 3).unique()) == len(keys)
    assert len({mix_seeds(1, 2), mix_seeds(2, 1), mix_seeds(1), mix_seeds(1, 2, 0)}) == 4
