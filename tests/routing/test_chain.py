"""Chain-of-Experts: the layer iterates, its gates differ, and everything that counts rows counts all iterations."""

import dataclasses

import pytest
import torch

from moedist.config import config_from_dict
from moedist.coordinator.sizes import Sizes
from moedist.errors import ConfigError
from moedist.routing import RouterInput, mix_seeds
from moedist.world import World
from tests.moe_cases import Case, build_layer
from tests.routing.test_routers import router

CASE = Case((0,) * 5, (3,), "chain", top_k=2, options=(("iterations", 3),), shared=4)


def test_a_layer_does_its_iterations_with_a_gate_each_and_the_residual_inside():
    layer, bank = build_layer(World(), CASE)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, 8, generator=generator, dtype=torch.float64)
    ids = torch.zeros(3, 6, dtype=torch.int64)
    inputs = RouterInput(x, ids, torch.arange(18).view(3, 6), 5, True)
    y, report = layer(inputs)
    state, loads, chosen = x, 0, []
    for t in range(3):
        probs = (state.flatten(0, 1) @ layer.router.weight[t].t()).softmax(-1)
        best = probs.topk(2)
        gates = best.values / best.values.sum(-1, keepdim=True)
        out = torch.zeros_like(state.flatten(0, 1))
        for e in range(5):
            tokens, place = (best.indices == e).nonzero(as_tuple=True)
            rows = state.flatten(0, 1)[tokens]
            counts = [len(rows) if i == e else 0 for i in range(5)]
            out = out.index_add(0, tokens, gates[tokens, place].unsqueeze(1) * bank(rows, counts))
        shared = layer.shared(x) if t == 0 else 0
        state = state + out.view_as(state) + shared
        loads = loads + torch.bincount(best.indices.flatten(), minlength=5)
        chosen.append(best.indices)
    torch.testing.assert_close(y, state)
    assert report.load_WE[0].tolist() == loads.tolist() == report.demand_E.tolist() and int(loads.sum()) == 3 * 2 * 18
    assert not torch.equal(chosen[0], chosen[1]), "gates differ"
    assert report.aux_losses["balance_loss"].item() / 18 >= 3 - 1e-9, "each iteration has its own"
    assert mix_seeds(5, 0) != mix_seeds(5, 1)


def test_planning_counts_every_iteration():
    config = config_from_dict({"router": {"name": "chain", "options": {"iterations": 3}}, "train": {"accumulate": 2}}, [])
    plain = Sizes.of(dataclasses.replace(config, router=dataclasses.replace(config.router, name="topk", options={})), 100)
    sizes = Sizes.of(config, 100)
    assert sizes.rows == 3 * plain.rows and sizes.expert_calls == 3 * plain.expert_calls == 6 and sizes.calls == plain.calls
    assert sizes.token_bytes > plain.token_bytes and sizes.dense_bytes > plain.dense_bytes


def test_no_iterations_are_refused():
    with pytest.raises(ConfigError, match="iterations is 0"):
        router("chain", options={"iterations": 0})
