"""What cannot be imported or exported, in words: the key, its value, and what is supported."""

import json
import shutil

import pytest
import torch

from moedist.cli import main
from moedist.config import config_from_dict
from moedist.errors import CheckpointError, ConfigError, DataError, MoedistError
from moedist.huggingface.fill import Table
from moedist.huggingface.import_run import default_name, plan_import
from moedist.huggingface.read_config import window_of
from moedist.huggingface.source import Source, find_source
from moedist.huggingface.write_config import choose_family
from tests.huggingface.models import OPTIONS, save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ("mixtral", "qwen3_moe", "olmoe", "llama")}


def check(folder, *overrides, upcycle=None):
    """All that an import looks at before it starts."""
    source = Source(folder)
    config, family, recipe, notices = plan_import(source, "x", "runs", [*OPTIONS, *overrides], upcycle)
    Table(source, config, family, recipe).check()
    return config, notices


def changed(folder, target, **keys):
    """A copy with other keys in its config.json; None removes one."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config = {k: v for k, v in {**config, **keys}.items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind, keys, words", [
    ("mixtral", {"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'; supported are mixtral, qwen3_moe, olmoe"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu', which this model cannot have; experts are SwiGLU here"),
    ("olmoe", {"attention_bias": True}, "attention_bias is True.*only false"),
    ("mixtral", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}.*dequantise"),
    ("mixtral", {"sliding_window": 16}, "sliding_window is 16, .*48 tokens; set data.sequence_length=16 or less"),
    ("olmoe", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'.*only 'default'"),
    ("olmoe", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
    ("olmoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*only 1"),
    ("olmoe", {"hidden_size": None}, "has no hidden_size; it is not a whole configuration of olmoe"),
    ("olmoe", {"num_hidden_layers": 4}, "no tensor 'model.layers.3.*is the folder whole"),
    ("olmoe", {"num_hidden_layers": 2}, "tensors that olmoe models have no place for here, such as 'model.layers.2"),
    ("olmoe", {"intermediate_size": 10}, r"of shape \\(12, 24\\), its config.json makes it \\(10, 24\\)"),
    ("olmoe", {"vocab_size": 200}, "tokenizer.json has .* tokens, .* has vocab_size 200"),
])
def test_configurations(folders, tmp_path, kind, keys, words):
    check(folders[kind], "data.sequence_length=48")
    with pytest.raises(MoedistError, match=words.replace("\\\\", "\\")):
        check(changed(folders[kind], tmp_path / kind, **keys), "data.sequence_length=48")


def test_windows_that_do_not_bind(folders, tmp_path):
    config, _ = check(changed(folders["mixtral"], tmp_path / "a", sliding_window=16))
    assert config.data.sequence_length == 16, "by default as long as both allow"
    assert window_of({"sliding_window": 16, "use_sliding_window": False}) is None
    assert check(folders["mixtral"])[0].data.sequence_length == 48


def test_dense_blocks_of_both_kinds(folders, tmp_path):
    config, _ = check(folders["qwen3_moe"])
    assert config.moe_layers() == [0, 2] and config.model.ffn_hidden == 20 and config.model.expert_hidden == 10
    with pytest.raises(CheckpointError, match="no tensor 'model.layers.0.mlp.gate_proj.weight'"):
        check(changed(folders["qwen3_moe"], tmp_path / "b", decoder_sparse_step=2, mlp_only_layers=[]))


def test_losses_and_notices(folders, tmp_path):
    folder = changed(folders["olmoe"], tmp_path / "a", router_aux_loss_coef=0.03, attention_dropout=0.1, eos_token_id=[7, 8])
    config, notices = check(folder)
    assert config.router.balance_loss == pytest.approx(0.06)  # theirs counts each of two choices
    assert "attention_dropout=0.1" in notices[0] and "eos_token_id [7, 8]" in notices[1] and len(notices) == 2
    assert check(folders["olmoe"])[1] == []


@pytest.mark.parametrize("override, words", [
    ("model.width=32", "model.width=32 does not fit .*config.json, which makes it 24"),
    ("model.vocab=400", "model.vocab=400"), ("router.normalize=true", "router.normalize=True"),
    ("router.name=switch", "router.name=switch")])
def test_overrides_that_would_make_another_model(folders, override, words):
    check(folders["olmoe"], "model.dropout=0.1", "model.recompute=true", "router.bias_rate=0.001", "train.lr=1e-4")
    with pytest.raises(ConfigError, match=words):
        check(folders["olmoe"], override)


def test_dense_and_sparse_are_not_mixed_up(folders):
    with pytest.raises(ConfigError, match="llama models are dense; give --upcycle experts=8,top_k=2"):
        check(folders["llama"])
    with pytest.raises(ConfigError, match="olmoe models have experts already; leave --upcycle out"):
        check(folders["olmoe"], upcycle="experts=4")
    with pytest.raises(ConfigError, match="intermediate_size is 24, which cannot be cut into granularity=5"):
        check(folders["llama"], upcycle="granularity=5")
    check(folders["llama"], upcycle="granularity=6")


def test_broken_folders(folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["olmoe"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged.*fetch it again"):
        check(broken)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors; write it again with save_pretrained"):
        check(broken)
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="no tensor 'model.embed_tokens.weight'"):
        check(broken)
    with pytest.raises(CheckpointError, match="names gone.safetensors, which is not there"):
        Source(broken).shape("lm_head.weight")
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no config.json that can be read"):
        check(broken)
    bare = changed(folders["olmoe"], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer.json; .*data.tokenizer=PATH"):
        check(bare)
    check(bare, "data.tokenizer=byte")


def test_float64_needs_float64(folders, tmp_path):
    from safetensors.torch import load_file, save_file
    wide = changed(folders["olmoe"], tmp_path / "wide")
    save_file({n: t.double() for n, t in load_file(wide / "model.safetensors").items()}, wide / "model.safetensors")
    with pytest.raises(ConfigError, match="in float64; set train.dtype=float64"):
        check(wide)
    check(wide, "train.dtype=float64")
    packed = changed(folders["olmoe"], tmp_path / "packed")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(packed / "model.safetensors").items()},
              packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="in F8_E4M3; weights must be in one of F64, F32, F16, BF16"):
        check(packed)


def test_names_and_places(tmp_path, capsys, monkeypatch):
    assert default_name("Qwen/Qwen3-30B A3B") == "Qwen3-30B-A3B"
    with pytest.raises(CheckpointError, match="no folder ./nothing; give a folder"):
        find_source("./nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no folder nobody/nothing, and the Hugging Face Hub does not give it"):
        find_source("nobody/nothing")
    with pytest.raises(SystemExit) as left:
        main(["import-hf", str(tmp_path)])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moedist: error: ") and "holds no config.json" in line


MODEL = {"model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1}}


@pytest.mark.parametrize("overrides, wanted, words", [
    (["model.activation=gelu"], None, "has model.activation=gelu"), (["model.shared_experts=1"], None, "shared_experts=1"),
    (["router.name=hash"], None, r"router.name=hash \(topk fits\)"), (["model.moe_every=0"], None, "a dense model"),
    (["router.bias_rate=0.1"], None, "router.bias_rate=0 leaves it out"),
    ([], "llama", "choose one of mixtral, qwen3_moe, olmoe"),
    ([], "olmoe", r"does not fit olmoe \(model.qk_norm=none, there all\)"),
    (["model.moe_every=2"], None, r"mixtral \(model.moe_every=2 and .*; nor qwen3_moe \(model.qk_norm=none, there head"),
    (["router.normalize=false"], "mixtral", "router.normalize=false"),
    (["model.qk_norm=head", "model.clip_qkv=2"], "qwen3_moe", "model.clip_qkv=2"),
    (["model.qk_norm=all", "model.head_width=6"], "olmoe", "model.head_width=6 apart"),
])
def test_models_that_no_architecture_is(overrides, wanted, words):
    with pytest.raises(ConfigError, match=words):
        choose_family(config_from_dict(MODEL, overrides), wanted)


def test_the_architecture_that_fits():
    def chosen(*overrides):
        return choose_family(config_from_dict(MODEL, overrides)).model_type

    assert chosen() == chosen("model.head_width=6") == "mixtral"
    assert chosen("model.qk_norm=head", "model.moe_every=2") == "qwen3_moe"
    assert chosen("model.qk_norm=head", "router.normalize=false") == "qwen3_moe"
    assert chosen("model.qk_norm=all", "model.clip_qkv=3") == "olmoe"
