"""MoE++: what tokens get without computing, and that a small tau sends fewer rows."""

import dataclasses

import pytest
import torch

from moedist.errors import ConfigError
from moedist.routing import balance_loss_sum
from tests.routing.test_routers import E, G, S, inputs, router


def test_zero_copy_and_constant_experts_give_what_they_are_called():
    r = router("moe_plus_plus", options={"zero": 1, "copy": 1, "constant": 1})
    i = inputs()
    a = r(i)
    x = i.x_GSD.flatten(0, 1)
    probs = (x @ r.weight.t()).softmax(-1)
    best = probs.topk(2)
    weights = best.values / best.values.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for t in range(G * S):
        for e, w in zip(best.indices[t].tolist(), weights[t]):
            if e == E + 1:
                expected[t] += w * x[t]
            elif e == E + 2:
                mix = (r.mixing @ x[t]).softmax(0)
                expected[t] += w * (mix[0] * x[t] + mix[1] * r.vectors[0])
    torch.testing.assert_close(a.direct_TD, expected)
    assert int((best.indices < E).sum()) == len(a.token_ids_N) and int(a.demand_E.sum()) == 2 * G * S
    assert set(best.indices.flatten().tolist()) >= {E, E + 1, E + 2}, "the case has all kinds"
    handed_on = r(dataclasses.replace(i, carried=a.carried)).carried
    torch.testing.assert_close(handed_on, a.carried + a.carried @ r.residual.t())


def test_the_loss_is_balanced_where_experts_have_tau_rows_to_one():
    r = router("moe_plus_plus", options={"tau": 0.25})
    q = r.balance_targets()
    assert len(q) == E + 4 and (q[:E] / q[-1]).tolist() == pytest.approx([0.25] * E) and q.sum() == pytest.approx(1)
    assert balance_loss_sum(q, (1e9 * q).long(), q).item() == pytest.approx(1)
    assert r.expected_rows_per_token() == pytest.approx(2 * 0.25 * E / (0.25 * E + 4))
    r.targets_E = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)  # ranks of several speeds
    assert (r.balance_targets()[:E] / r.balance_targets()[:E].sum()).tolist() == pytest.approx(r.targets_E.tolist())


def test_a_small_tau_sends_fewer_rows():
    def sent(tau):
        r = router("moe_plus_plus", options={"tau": tau})
        optimizer = torch.optim.Adam(r.parameters(), 0.02)
        for _ in range(60):
            a = r(inputs())
            loss = balance_loss_sum(a.prob_sum_E, a.demand_E, r.balance_targets())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return len(a.token_ids_N)
    assert sent(0.1) < 0.7 * sent(3.0)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="one at least"):
        router("moe_plus_plus", options={"zero": 0, "copy": 0, "constant": 0})
    with pytest.raises(ConfigError, match="tau is -1"):
        router("moe_plus_plus", options={"tau": -1.0})
