"""Models that transformers made: imported they give the same logits, exported the same bits."""

import json
import shutil
import signal

import pytest
import torch

from moedist.checkpoint import RunFolder
from moedist.data import Tokenizer
from moedist.decoding import Sampling, generate_batch
from moedist.huggingface import export_run, import_run
from moedist.huggingface.fill import Table
from moedist.huggingface.import_run import import_into, plan_import
from moedist.huggingface.source import Source
from moedist.phases.restore import open_run
from moedist.trainer import train
from moedist.world import World
from tests.huggingface.models import (
    OPTIONS, SPARSE, equal_tensors, our_logits, save_model, some_ids, stored_tensors, their_logits, their_texts,
)
from tests.launching import metrics
from tests.ranks import run_ranks

ALSO_CALLED = {"num_experts", "num_local_experts"}  # versions of transformers differ: both are written
CLOSE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=SPARSE)
def model(request, tmp_path_factory):
    """(folder that transformers wrote, run that it was imported into)."""
    folder = save_model(tmp_path_factory.mktemp("models") / request.param, request.param, begin=request.param == "mixtral")
    return folder, import_run(str(folder), folder=str(folder.parent / "runs"), overrides=OPTIONS)


@pytest.fixture(scope="module")
def exported(model):
    folder, run = model
    target = folder.parent / "exported"
    export_run(str(run), str(target))
    return target


def test_logits_are_those_of_transformers(model):
    folder, run = model
    theirs = their_logits(folder)
    assert theirs.std() > 0.5, "logits near zero would hide mistakes"
    torch.testing.assert_close(our_logits(run), theirs, **CLOSE)


def test_greedy_texts_are_those_of_transformers(model, one_thread):
    """Token by token, with our cache and theirs: prompts of several lengths together, and one after the other."""
    folder, run = model
    prompts = [row[:n].tolist() for row, n in zip(some_ids(), (3, 17, 9))]
    opened = open_run(run, run.config(), World())
    for penalty, theirs in zip((1.0, 1.5), their_texts(folder, prompts, 14, (1.0, 1.5))):
        found = generate_batch(opened.model, World(), prompts, Sampling(14, temperature=0, repetition_penalty=penalty),
                               context=48, eos=0)
        assert found.timings.cached and len({i for (ids,) in found.ids for i in ids}) > 5
        assert [ids for ids, in found.ids] == theirs


def test_exported_tensors_have_the_same_bits(model, exported):
    assert equal_tensors(stored_tensors(exported), stored_tensors(model[0]))
    assert torch.equal(their_logits(exported), their_logits(model[0]))
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(exported).values())


def test_exported_config_says_the_same(model, exported):
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (model[0], exported))
        assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} <= ALSO_CALLED


def test_tokenizer_is_kept(model, exported):
    from transformers import AutoTokenizer
    folder, run = model
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (folder / name).read_bytes()
    theirs, ours = AutoTokenizer.from_pretrained(exported), Tokenizer.load(run.path)
    text = "def read(self):\n    return path\n"
    assert ours.encode(text) == theirs(text)["input_ids"] and theirs.eos_token_id == ours.eos_id == 0
    assert (ours.encode("")[:1] == [1]) == (folder.name == "mixtral")  # its tokenizer begins texts with a token
    assert ours.decode(ours.encode(text)) == text


def test_two_steps_of_training_and_then_the_trained_weights(model, tmp_path):
    folder, run = model
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        train(None, resume=str(run))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    losses = metrics(run.path)
    assert sorted(losses) == [1, 2] and all(0 < loss < 20 for loss in losses.values())
    export_run(str(run), str(tmp_path / "trained"))
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "trained")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[n], after[n]) for n in before) > 0.9 * len(before)
    torch.testing.assert_close(their_logits(tmp_path / "trained"), our_logits(run), **CLOSE)
    export_run(str(run), str(tmp_path / "first"), step=0)
    assert equal_tensors(stored_tensors(tmp_path / "first"), before)


def import_on_ranks(world, source, target, owners):
    """Import in a world that exists; (experts that this rank read, logits of this rank, tensors held here)."""
    source = Source(source)
    config, family, recipe, _ = plan_import(source, "two", target, [*OPTIONS, f"placement.owners={owners}"], None)
    table, read = Table(source, config, family, recipe), []
    original = source.read
    source.read = lambda name, *where: read.append(name) or original(name, *where)
    run = import_into(world, table, config)
    return sorted({int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}), \
        our_logits(run, world), len(read), str(run)


def test_two_ranks_read_their_own_experts_and_give_the_same_logits(model, tmp_path, cache):
    folder, _ = model
    run_ranks(2, set_cache, str(cache))
    experts = {"mixtral": 5}.get(folder.name, 6)
    mine = [e for e in range(experts) if e != 3]
    (first, logits, count, run), (second, more, _, _) = run_ranks(2, import_on_ranks, str(folder), str(tmp_path),
                                                                  f"{{0: {mine}, 1: [3]}}")
    assert first == mine and second == [3]
    theirs = their_logits(folder)
    torch.testing.assert_close(logits, theirs, **CLOSE)
    torch.testing.assert_close(more, theirs, **CLOSE)
    assert count < len(stored_tensors(folder))
    export_run(run, str(tmp_path / "out"))
    assert equal_tensors(stored_tensors(tmp_path / "out"), stored_tensors(folder))


def set_cache(world, folder):
    import os
    os.environ["MOEDIST_CACHE"] = folder


def test_low_precision_and_one_tensor_in_another(tmp_path):
    folder = save_model(tmp_path / "low", "olmoe", dtype=torch.bfloat16)
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"] = torch.randn(6, 24)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = import_run(str(folder), folder=str(tmp_path / "runs"), overrides=OPTIONS)
    torch.testing.assert_close(our_logits(run), their_logits(folder), **CLOSE)
    export_run(str(run), str(tmp_path / "out"))
    assert equal_tensors(stored_tensors(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    export_run(str(run), str(tmp_path / "wide"), dtype="float32")
    assert all(torch.equal(t, tensors[n].float()) for n, t in stored_tensors(tmp_path / "wide").items())


def test_sharded_fused_and_old_keys(tmp_path):
    plain = save_model(tmp_path / "plain", "qwen3_moe")
    sharded = save_model(tmp_path / "sharded", "qwen3_moe", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and (sharded / "model.safetensors.index.json").is_file()
    fused = save_model(tmp_path / "fused", "qwen3_moe", original=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored_tensors(fused)
    old = tmp_path / "old"
    shutil.copytree(plain, old)
    config = json.loads((old / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None,
               "torch_dtype": config.pop("dtype"), "num_experts": config.pop("num_local_experts")}
    (old / "config.json").write_text(json.dumps(config))
    expected = stored_tensors(plain)
    for folder in (sharded, fused, old):
        run = import_run(str(folder), folder=str(tmp_path / "runs"), overrides=OPTIONS)
        export_run(str(run), str(folder / "out"), shard_gib=20_000 / 2**30)
        assert equal_tensors(stored_tensors(folder / "out"), expected), folder
    assert len(list((old / "out").glob("*.safetensors"))) > 2
    again = json.loads((old / "out" / "config.json").read_text())
    assert {key: again[key] for key in config} == config and "rope_parameters" not in again
    assert RunFolder(run.path).config().model.rope_base == 5e4
