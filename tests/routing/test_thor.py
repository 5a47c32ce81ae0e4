"""THOR: a training batch makes two draws, whose loss is that of two passes, and training makes them agree."""

import dataclasses

import pytest
import torch

from moedist.engine.forward import forward_loss, hidden_states, training_loss
from moedist.errors import ConfigError
from moedist.model import Batch, consistency_loss_sum
from moedist.phases.train import train_step
from moedist.trainer import build_run, written_plan
from moedist.world import World
from tests.routing.test_routers import router
from tests.routing.tiny_training import config_of

CPU = torch.device("cpu")


def run_of(folder, consistency, monkeypatch=None):
    config = config_of("thor", folder)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, options={"consistency": consistency}))
    run = build_run(config, World(), written_plan(config, 1, None)[0])
    run.model.train()
    return run


def parts(run):
    batch, targets = next(iter(run.batches(0, 0)))
    return batch, targets, run.model


def test_the_loss_of_two_draws_is_that_of_two_passes(tmp_path):
    run = run_of(tmp_path, 5.0)
    batch, targets, model = parts(run)
    loss, reports = training_loss(model, batch, targets, CPU, torch.float64)
    other = Batch(batch.ids_GS, batch.keys_GS + (1 << 48), batch.seed)
    with torch.no_grad():
        passes = [forward_loss(model, b, targets, CPU, torch.float64) for b in (batch, other)]
        hidden = [hidden_states(model, b, torch.float64)[0].flatten(0, 1) for b in (batch, other)]
        apart = consistency_loss_sum(*hidden, model.head_weight, targets.flatten())
    assert loss.item() == pytest.approx((passes[0][0] + passes[1][0]).item() / 2)
    assert reports[0].aux_losses["consistency"].item() == pytest.approx(apart.item()) and apart > 0
    assert "consistency" not in reports[1].aux_losses
    assert torch.equal(reports[0].load_WE, passes[0][1][0].load_WE + passes[1][1][0].load_WE)
    assert not torch.equal(passes[0][1][0].load_WE, passes[1][1][0].load_WE), "other experts"
    weight = model.get_submodule("layers.0.ffn").router.loss_weights()["consistency"]
    assert weight == 2.5
    run.recorder.close()


def test_training_makes_the_draws_agree(tmp_path):
    ends = {}
    for consistency in (0.0, 5.0):
        run = run_of(tmp_path / str(consistency), consistency)
        for _ in range(16):
            report = train_step(run)
        batch, targets, model = parts(run)
        _, reports = training_loss(model, batch, targets, CPU, torch.float64)
        ends[consistency] = reports[0].aux_losses["consistency"].item() / targets.numel()
        assert report.sums["router_loss"] >= 0 and sum(report.ranks.rows[0]) == 2 * 2 * 8 * 32  # two draws of two experts
        run.recorder.close()
    assert ends[5.0] < ends[0.0] / 2


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ConfigError, match="consistency is -1"):
        router("thor", options={"consistency": -1.0})
