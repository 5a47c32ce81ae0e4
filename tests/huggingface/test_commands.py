"""As a user goes: import on two ranks, train, generate, export, and runs that were never imported."""

import json

import pytest
import torch

from moedist.checkpoint import RunFolder
from moedist.compressing import compress_run
from moedist.config import CompressConfig, check_config, config_from_dict
from moedist.coordinator import Sizes, equal_plan
from moedist.data import Tokenizer
from moedist.errors import ConfigError, DataError
from moedist.huggingface import export_run, import_run
from moedist.phases.restore import open_run
from moedist.trainer import build_run
from moedist.world import World
from tests.huggingface.models import OPTIONS, equal_tensors, our_logits, save_model, stored_tensors, their_logits
from tests.launching import metrics, moedist, only_run


def test_two_ranks_import_train_and_export(tmp_path, cache):
    folder = save_model(tmp_path / "model", "qwen3_moe", shard="30KB")
    done = moedist(2, cache, "import-hf", str(folder), "--name", "tiny", "--folder", str(tmp_path / "runs"), *OPTIONS,
                   "placement.counts=[5,1]")
    run = only_run(tmp_path / "runs")
    assert run.name.startswith("tiny-") and f"moedist generate {run}" in done.stdout
    torch.testing.assert_close(our_logits(run), their_logits(folder), rtol=0, atol=1e-5)
    (text,) = moedist(1, cache, "generate", str(run), "--prompt", "def read", "--max-tokens", "4", "--temperature",
                      "0").stdout.splitlines()[:1]
    assert text.startswith("def read")
    moedist(2, cache, "train", "--resume", str(run))
    assert sorted(metrics(run)) == [1, 2]
    told = moedist(2, cache, "export-hf", str(run), str(tmp_path / "out"), "--step", "0", "--shard-gib", "3e-5").stdout
    assert "Qwen3MoeForCausalLM of step 0" in told
    assert equal_tensors(stored_tensors(tmp_path / "out"), stored_tensors(folder))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    experts = {}  # file -> experts in it
    for name, file in index.items():
        experts.setdefault(file, set()).update({int(name.split(".experts.")[1].split(".")[0])} if ".experts." in name else ())
    assert any(found and found <= {3, 4, 5} for found in experts.values()), "three experts were on the other rank"
    assert not any(found & {0, 1, 2} and found & {3, 4, 5} for found in experts.values()), "a file was written by one rank"
    assert "is in use" in moedist(1, cache, "export-hf", str(run), str(tmp_path / "out"), ok=False).stderr


def test_compressed_experts_are_filled_up(tmp_path):
    run = import_run(str(save_model(tmp_path / "model", "mixtral")), folder=str(tmp_path / "runs"), overrides=OPTIONS)
    small = compress_run(str(run), CompressConfig(method="cur", ratio=0.5, tokens=96, options={"multiple": 1}),
                         [f"folder={tmp_path / 'small'}"])
    lines = export_run(str(small), str(tmp_path / "out"))
    widths = {e["hidden"] for e in json.loads(next(small.path.glob("compression-*.json")).read_text())["experts"]}
    assert len(widths) > 1 and f"experts have {min(widths)} to {max(widths)} neurons" in lines[1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == max(widths)
    torch.testing.assert_close(their_logits(tmp_path / "out"), our_logits(small), rtol=0, atol=1e-5)
    factored = compress_run(str(run), CompressConfig(method="svd", ratio=0.5, tokens=96), [f"folder={tmp_path / 'svd'}"])
    (line,) = export_run(str(factored), str(tmp_path / "multiplied"))
    assert json.loads((tmp_path / "multiplied" / "config.json").read_text())["intermediate_size"] == 14
    torch.testing.assert_close(their_logits(tmp_path / "multiplied"), our_logits(factored), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_run_that_began_here_opens_in_transformers(tmp_path, tokenizer):
    from transformers import AutoTokenizer
    model = {"layers": 2, "width": 24, "heads": 4, "kv_heads": 2, "expert_hidden": 10, "experts": 4}
    config = config_from_dict({"model": model, "folder": str(tmp_path)},
                              [*OPTIONS, f"data.tokenizer={tokenizer}", "data.vocab=330"])
    run = build_run(config, World(), equal_plan(config, 1))
    run.save()
    run.recorder.close()
    export_run(str(run.folder), str(tmp_path / "out"))
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = Tokenizer.load(run.folder.path)
    assert opened("def f(x): 'ü'")["input_ids"] == own.encode("def f(x): 'ü'") and opened.eos_token_id == own.eos_id
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["architectures"] == ["MixtralForCausalLM"] and found["max_position_embeddings"] == 256
    assert found["eos_token_id"] == own.eos_id and found["torch_dtype"] == "float32"
    if tokenizer == "bpe":  # as many rows as `some_ids` draws from
        torch.testing.assert_close(their_logits(tmp_path / "out"), our_logits(run.folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("overrides", [
    ["model.head_width=6", "model.qk_norm=head"], ["model.qk_norm=all", "model.vocab=70"],
    ["model.dense_blocks=[1]", "model.head_width=20", "model.tie_embeddings=false"]])
def test_sizes_count_the_keys_of_attention(overrides, tmp_path):
    config = config_from_dict({"model": {"layers": 2, "width": 24, "heads": 4, "kv_heads": 2}, "folder": str(tmp_path)},
                              [*OPTIONS, "data.tokenizer=byte", *overrides, "model.vocab=300"])
    check_config(config, 1)
    run = build_run(config, World(), equal_plan(config, 1))
    run.recorder.close()
    assert Sizes.of(config, 257).dense_bytes == 4 * sum(p.numel() for p in run.model.parameters())


@pytest.mark.parametrize("overrides, words", [
    (["model.head_width=5"], "head_width .5. must be even"),
    (["model.head_width=0"], "model.head_width is 0; it must be above 0"),
    (["model.clip_qkv=-1"], "model.clip_qkv is -1.0"), (["model.vocab=0"], "model.vocab is 0"),
    (["model.qk_norm=both"], "qk_norm is 'both'; choose one of none, head, all"),
    (["model.dense_blocks=[0,4]"], r"dense_blocks is \[0, 4\]: the blocks are 0..3"),
    (["model.moe_every=2", "model.dense_blocks=[1,3]"], "one of them must keep its experts")])
def test_model_keys_out_of_range(overrides, words):
    with pytest.raises(ConfigError, match=words):
        check_config(config_from_dict({}, overrides), 1)
    check_config(config_from_dict({}, ["model.width=250", "model.head_width=6", "model.dense_blocks=[3]"]), 1)


def test_the_same_tokenizer_with_another_end_needs_another_cache(tmp_path, cache):
    folder = save_model(tmp_path / "model", "olmoe")
    import_run(str(folder), folder=str(tmp_path / "runs"), overrides=OPTIONS)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|begin|>"}}))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).eos_id == 1
    with pytest.raises(DataError, match="ended by token 0 instead of 1; set data.cache to another folder"):
        import_run(str(folder), folder=str(tmp_path / "runs"), overrides=OPTIONS)
    run = import_run(str(folder), folder=str(tmp_path / "runs"), overrides=[*OPTIONS, f"data.cache={tmp_path / 'cache'}"])
    assert open_run(run, RunFolder(run.path).config(), World()).tokenizer.eos_id == 1
