"""Balancing to targets: the loss is least and the bias rests where loads are what the plan wants."""

import pytest
import torch

from moedist.config import RouterConfig, check_config, config_from_dict
from moedist.errors import ConfigError
from moedist.routing import ROUTERS, RouterInput, balance_loss_sum, build_router, check_router
from tests.routing.test_routers import router

E = 5
Q = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)


def test_the_loss_is_one_at_the_targets_and_more_elsewhere():
    def loss(f):
        return balance_loss_sum(100 * f, (1e6 * f).long(), Q).item() / 100

    assert loss(Q) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert loss(torch.rand(E, generator=generator, dtype=torch.float64).softmax(0)) > 1.0001
    even = torch.full((E,), 1 / E, dtype=torch.float64)
    for f in (Q, even):  # equal targets are the plain loss
        demand = (1e6 * f).long()
        torch.testing.assert_close(balance_loss_sum(f, demand, even), balance_loss_sum(f, demand))


def test_the_gradient_moves_no_logit_at_the_targets():
    logits = Q.log().requires_grad_()
    balance_loss_sum(logits.softmax(0), (1e6 * Q).long(), Q).backward()
    assert logits.grad.abs().max() < 1e-6
    logits = torch.zeros(E, dtype=torch.float64, requires_grad=True)
    balance_loss_sum(logits.softmax(0), torch.full((E,), 1000), Q).backward()
    assert bool((logits.grad[:2] < 0).all()) and bool((logits.grad[3:] > 0).all()), "down the gradient: more for the first"


@pytest.mark.parametrize("where, rule, rate", [("choice", "sign", 0.004), ("choice", "proportional", 0.02),
                                               ("logits", "sign", 0.02), ("logits", "proportional", 0.1)])
def test_the_bias_brings_loads_to_the_targets(where, rule, rate):
    r = build_router(6, E, 2, RouterConfig(bias_rate=rate, bias_rule=rule, bias_in=where, balance_to="speed"), 64).double()
    with torch.no_grad():
        r.weight.copy_(torch.randn(r.weight.shape, generator=torch.Generator().manual_seed(1)) / 2)
    r.targets_E = Q
    x = torch.randn(8, 64, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    i = RouterInput(x, torch.zeros(8, 64, dtype=torch.int64), torch.arange(512).view(8, 64), 0, True)
    for _ in range(400):
        demand = r(i).demand_E
        r.after_step(demand)
    assert (demand / demand.sum() - Q).abs().max() < 0.02
    assert r.aimed_at(demand).tolist() == pytest.approx((1024 * Q).tolist())
    r.targets_E = None
    assert r.aimed_at(demand).tolist() == pytest.approx([1024 / E] * E)


def config_of(**router_config):
    return config_from_dict({"router": router_config, "model": {"shared_experts": 1}}, [])


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_routers_that_cannot_aim_are_refused(name):
    config = config_of(name=name, balance_to="speed", capacity_factor=1.0)
    cannot = ("random", "hash", "thor", "expert_choice", "soft_moe",  # nothing moves their loads, or they are equal anyway
              "grouped", "comet", "null_experts", "sigma_moe", "sinkhorn")  # what balances them is not ours to aim
    assert ROUTERS[name].balances == (name not in cannot)
    if ROUTERS[name].balances:
        check_router(config)
        assert router(name).balances
    else:
        with pytest.raises(ConfigError, match=f"router {name} cannot aim at loads.*topk"):
            check_router(config)


def test_something_must_balance():
    with pytest.raises(ConfigError, match="both 0, so nothing balances"):
        check_config(config_of(balance_to="speed", balance_loss=0.0), 1)
