"""Experts that several layers share: who may choose what, and that one pool is one set of experts to everything else."""

import json

import pytest
import torch

from moedist.config import RouterConfig, check_config, config_from_dict
from moedist.coordinator import written_plan
from moedist.coordinator.sizes import Sizes
from moedist.dispatch import build_transport
from moedist.errors import ConfigError
from moedist.model import Batch, Transformer
from moedist.routing import build_router, check_router
from moedist.world import World
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.routing.test_routers import inputs

POOL = ["router.name=rexmoe", "model.pool_layers=2", "model.experts=8", "model.layers=4", "router.options={steps: 6}",
        "placement.counts=null", "placement.batch_shares=null", "train.dtype=float64", "train.eps=1e-4"]


def rexmoe(place: int, layers: int = 2, steps: int = 4):
    r = build_router(6, 8, 2, RouterConfig(name="rexmoe", options={"steps": steps}), 8).double()
    torch.nn.init.normal_(r.weight, generator=torch.Generator().manual_seed(place))
    r.take_place(place, layers)
    return r


@pytest.mark.parametrize("place", [0, 1])
def test_a_router_begins_with_its_own_experts_and_ends_with_all(place):
    r = rexmoe(place)
    chosen = []
    for step in range(6):
        seen = torch.cat([r(inputs(x=torch.randn(20, 8, 6, dtype=torch.float64,
                                                 generator=torch.Generator().manual_seed(i)))).expert_ids_N for i in range(5)])
        chosen.append(set(seen.tolist()))
        r.after_step(torch.ones(8))
    assert chosen[0] == set(range(4 * place, 4 * place + 4))
    assert [len(c) for c in chosen] == [4, 5, 6, 7, 8, 8] and all(a <= b for a, b in zip(chosen, chosen[1:]))
    assert rexmoe(place, steps=0)(inputs()).prob_sum_E.min() > 0


def test_masked_experts_have_no_probability_and_the_loss_is_finite():
    a = rexmoe(0)(inputs())
    assert a.prob_sum_E[4:].abs().max() == 0
    a = build_router(6, 8, 2, RouterConfig(name="rexmoe", z_loss=0.1, options={"steps": 9}), 8)
    a.take_place(1, 4)
    torch.nn.init.normal_(a.weight)
    assert torch.isfinite(a(inputs(x=torch.randn(3, 8, 6))).aux_losses["z_loss"])


def config_of(**model):
    model = {"layers": 4, "experts": 8, "pool_layers": 2, **model}
    return config_from_dict({"model": model, "router": {"name": "rexmoe"}, "data": {"sequence_length": 16}})


def test_a_pool_belongs_to_its_first_layer():
    config = config_of(layers=6, pool_layers=3, experts=6, dense_blocks=[])
    assert config.moe_layers() == [0, 3] and config.routed_layers() == list(range(6))
    sizes = Sizes.of(config, 100)
    assert sizes.moe_layers == (0, 3) and sizes.rows_per_token == 3 * config.model.top_k
    check_config(config, 1)
    check_router(config)


@pytest.mark.parametrize("model, words", [
    ({"layers": 3}, r"3 blocks have experts.*one of \[1, 3\]"), ({"pool_layers": 1}, "model.pool_layers=2"),
    ({"experts": 7}, "of the pool, 7")])
def test_pools_that_cannot_be_are_refused(model, words):
    with pytest.raises(ConfigError, match=words):
        check_config(config_of(**model), 1)


def test_a_run_trains_moves_compresses_resumes_and_generates_on_any_ranks(tmp_path, cache):
    """Losses of one and three ranks are the same, experts moving on the way; a compression in the middle; every reader."""
    phases = "phases=[{train: 5}, {compress: {method: cur, ratio: 0.4, tokens: 512}}, {train: 3}]"
    found = []
    for ranks, more in ((1, []), (3, ["placement.owners={0: [0, 5], 1: [1, 2, 7], 2: [3, 4, 6]}"])):
        folder = tmp_path / str(ranks)
        moedist(ranks, cache, "train", *QUICKSTART, *POOL, phases, f"folder={folder}", "monitor.log_every=1", *more)
        run = only_run(folder)
        found.append(metrics(run))
        layers = {int(i) for line in (run / "loads.jsonl").read_text().splitlines() for i in json.loads(line)["loads"]}
        assert layers == {0, 2}
    for step, loss in found[0].items():
        assert loss == pytest.approx(found[1][step], abs=1e-6), step
    said = moedist(2, cache, "train", "--resume", str(run), "phases=[{train: 5}, {compress: {method: cur, ratio: 0.4, "
                   "tokens: 512}}, {train: 4}]", "train.eval_every=0").stdout
    assert "done: 9 steps" in said
    assert moedist(1, cache, "generate", str(run), "--prompt", "def ", "--max-tokens", "3").stdout.startswith("def ")
    routing = moedist(2, cache, "inspect", str(run), "--routing", "--segments", "4").stdout
    assert all(f"\n{i} " in routing or f"\n    {i} " in routing or f" {i} " in routing for i in range(4))
    refused = moedist(1, cache, "export-hf", str(run), str(tmp_path / "hf"), ok=False).stderr
    assert "model.pool_layers=2" in refused and "Traceback" not in refused


def test_a_pool_is_layers_whose_experts_are_tied():
    """With any router: outputs are those of layers that hold equal experts, and gradients their sum."""
    def model_of(pool):
        config = config_from_dict({
            "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_hidden": 8, "pool_layers": pool},
            "data": {"sequence_length": 6}, "placement": {"planner": "equal"}})
        world = World()
        return Transformer(config, 21, written_plan(config, 1, None)[0], build_transport(world), world.device, torch.float64)

    tied, pooled = model_of(1), model_of(2)
    assert list(pooled.banks) == [0] and list(tied.banks) == [0, 1]
    with torch.no_grad():
        for weight, other in zip(tied.banks[0].parameters(), tied.banks[1].parameters()):
            other.copy_(weight)
    ids = torch.arange(18).view(3, 6)
    batch = Batch(ids, ids, 0)
    (a, reports), (b, shared) = tied(batch), pooled(batch)
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    assert torch.equal(shared[0].load_WE, reports[0].load_WE + reports[1].load_WE) and list(shared) == [0]
    assert shared[0].aux_losses["balance_loss"].item() == pytest.approx(sum(
        r.aux_losses["balance_loss"].item() for r in reports.values()))
    a.sin().sum().backward()
    b.sin().sum().backward()
    for first, second, both in zip(tied.banks[0].parameters(), tied.banks[1].parameters(), pooled.banks[0].parameters()):
        torch.testing.assert_close(both.grad, first.grad + second.grad, rtol=1e-10, atol=1e-12)
