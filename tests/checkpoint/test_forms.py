"""Checkpoints of compressed experts tell their forms, so that any world opens them."""

import shutil

import pytest
import torch

from moedist.checkpoint import RunFolder, forms_of, load_checkpoint, read_meta, save_checkpoint
from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.dispatch import build_transport
from moedist.engine import TorchEngine, replace_experts
from moedist.errors import CheckpointError
from moedist.model import ExpertForm, Transformer
from moedist.placement import plan_from_config
from moedist.trainer import build_run
from moedist.world import World
from tests.engine.test_engine import TINY, engine_of
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.model.expert_forms import expert_of
from tests.ranks import run_ranks

EXPERTS = {0: expert_of("interp", 8, 16, 3, seed=1), 2: expert_of("two dense cur", 5, 16, 2, seed=2, before=8),
           3: expert_of("dense", 4, 16, seed=3, before=8)}


def replaced(engine, experts):
    replace_experts(engine, {layer: {e: experts[e] for e in moe.dispatcher.layout.primary_experts if e in experts}
                             for layer, moe in engine.model.moe_layers()})
    return engine


def save(world, folder, counts):
    """Returns what this rank has written; every moment is a function of its name."""
    engine = replaced(engine_of(world, counts), EXPERTS)
    tensors = engine.named_tensors()
    for name, tensor in tensors.items():
        if name.startswith("optimizer"):
            tensor.fill_(sum(map(ord, name)))
    save_checkpoint(RunFolder(folder), 3, tensors, {"step": 3}, world, 2)
    return {name: t.clone() for name, t in tensors.items()}


def load(world, folder, counts):
    checkpoint = RunFolder(folder).newest()
    config = config_from_dict({**TINY, "placement": {"counts": counts}})
    model = Transformer(config, 20, plan_from_config(config, world.size), build_transport(world), torch.device("cpu"),
                        torch.float64, forms=forms_of(checkpoint))
    engine = TorchEngine(model, config.train, world)
    load_checkpoint(checkpoint, engine.named_tensors(), world)
    engine.loaded({"updates": 3.0, "scale": 1.0, "good_steps": 0})
    return {name: t.clone() for name, t in engine.named_tensors().items()}


@pytest.mark.parametrize("reader", [[4], [1, 0, 3], [0, 2, 2]])
def test_two_ranks_write_what_one_and_three_read(tmp_path, reader):
    written = {}
    for part in run_ranks(2, save, tmp_path, [1, 3]):
        written |= part
    found = {}
    for part in run_ranks(len(reader), load, tmp_path, reader):
        for name, tensor in part.items():
            assert torch.equal(tensor, written[name]), name
        found |= part
    assert found.keys() == written.keys()
    assert {"layers.1.experts.2.neurons", "layers.0.experts.0.w3.kept"} <= found.keys()
    assert "optimizer.exp_avg.layers.0.experts.2.w2.core" in found


def test_forms_are_read_from_names_and_shapes(tmp_path):
    run_ranks(1, save, tmp_path, [4])
    expected = {e: ExpertForm.of(expert) for e, expert in EXPERTS.items()} | {1: ExpertForm.dense(16, 8, True)}
    assert forms_of(RunFolder(tmp_path).newest()) == {0: expected, 1: expected}


def test_forms_from_elsewhere_and_damage_are_named(tmp_path):
    save_checkpoint(RunFolder(tmp_path), 1, {"layers.0.experts.0.w1.quantised": torch.zeros(2)}, {}, World(), 1)
    checkpoint = RunFolder(tmp_path).newest()
    with pytest.raises(CheckpointError, match="a form unknown here.*quantised.*version of moedist"):
        forms_of(checkpoint)
    (checkpoint / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        forms_of(checkpoint)


def test_a_run_of_factored_experts_is_opened_by_every_command(tmp_path, cache, monkeypatch):
    """Evaluate, generate and train --resume, on one rank and on several, give the same."""
    monkeypatch.setenv("MOEDIST_CACHE", str(cache))
    common = ["train.dtype=float64", "placement.counts=null", "placement.batch_shares=null", "train.eps=1e-5"]
    moedist(1, cache, "train", *QUICKSTART, *common, f"folder={tmp_path}/a", "phases=[{train: 3}]")
    folder = RunFolder(only_run(tmp_path / "a"))
    config, meta = folder.config(), read_meta(folder.newest())
    run = build_run(config, World(), written_plan(config, 1, meta)[0], folder, folder.newest(), meta)
    replaced(run.engine, {0: expert_of("interp", 24, 32, 5, seed=1), 1: expert_of("dense", 8, 32, seed=2, before=24),
                          5: expert_of("cur two interp", 16, 32, 4, seed=3, before=24)})
    shutil.rmtree(folder.newest())
    run.save()
    run.recorder.close()
    path = str(folder)
    evaluated = {moedist(n, cache, "evaluate", path, "train.batch=256").stdout for n in (1, 3)}
    texts = {moedist(n, cache, "generate", path, "--prompt", "def ", "--max-tokens", "8").stdout for n in (1, 2)}
    assert len(evaluated) == len(texts) == 1 and "perplexity" in evaluated.pop()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = only_run(tmp_path / "b")
    moedist(1, cache, "train", "--resume", path, "phases=[{train: 6}]")
    moedist(3, cache, "train", "--resume", str(other), "phases=[{train: 6}]")
    losses = metrics(folder.path)
    assert len(losses) == 6 and losses == pytest.approx(metrics(other), abs=1e-9)
