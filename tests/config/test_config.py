"""Configuration: defaults, overrides, errors, and the files in configs/."""

import dataclasses
import re
from pathlib import Path

import pytest

from moedist.config import Config, check_config, config_from_dict, describe_keys, load_config, to_yaml
from moedist.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_defaults_are_valid_for_any_world():
    for world_size in (1, 2, 7):
        check_config(Config(), world_size)


def test_overrides_win_and_are_typed():
    config = config_from_dict({"model": {"top_k": 4}}, ["model.top_k=3", "train.lr=3e-4", "phases=[{train: 7}]",
                                                        "placement.owners={0: [1, 0], 1: [2]}"])
    assert (config.model.top_k, config.train.lr, config.train_steps) == (3, 3e-4, 7)
    assert config.placement.owners == {0: [1, 0], 1: [2]}
    islands = config_from_dict({}, ["world.islands=[nvidia,amd]", "dispatch.overlap=true", "dispatch.cross_dtype=int8"])
    check_config(islands, 2)
    assert islands.world.islands == ["nvidia", "amd"] and islands.dispatch.overlap is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize("override, nearest", [
    ("model.topk=3", "model.top_k"), ("top_k=3", "model.top_k"), ("train.learning_rate=1", "train"),
    ("modle.layers=1", "model"), ("train.batchsize=1", "train.batch")])
def test_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(ConfigError, match="unknown key") as error:
        config_from_dict({}, [override])
    assert nearest in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["train.lr=fast", "model.layers=1.5", "model.tie_embeddings=3.5", "nonsense",
                                      "phases=[{train: 20"])
def test_bad_value_is_one_line(override):
    with pytest.raises(ConfigError) as error:
        config_from_dict({}, [override])
    assert "\n" not in str(error.value) and override.split("=")[0] in str(error.value)


@pytest.mark.parametrize("overrides, words", [
    (["model.top_k=9"], ["top_k (9)", "experts (8)", "model.top_k=8"]),
    (["model.heads=3"], ["256", "3"]),
    (["model.kv_heads=3"], ["multiple", "kv_heads (3)"]),
    (["train.batch=10", "train.accumulate=4"], ["10", "4", "train.batch=12"]),
    (["router.name=topp"], ["topp", "expert_choice"]),
    (["router.name=switch"], ["top_k is 2"]),
    (["router.name=shared_expert"], ["shared_experts is 0"]),
    (["router.name=hash", "router.bias_rate=0.1"], ["bias_rate"]),
    (["router.bias_in=logits"], ["router.bias_rate is 0", "router.bias_rate=0.05"]),
    (["router.name=soft_moe", "router.capacity_factor=0"], ["capacity_factor"]),
    (["train.batch=0"], ["train.batch is 0"]),
    (["model.dropout=1.0"], ["dropout"]),
    (["model.moe_every=9"], ["moe_every (9)", "layers (4)"]),
    (["phases=[]"], ["phases is empty"]),
    (["phases=[{sleep: 3}]"], ["sleep", "train"]),
    (["phases=[{train: -3}]"], ["-3"]),
    (["data.source=files"], ["data.path"]),
    (["world.device='cpu,cpu,cpu'"], ["3 devices", "2 ranks"]),
    (["world.islands=[nvidia,amd,amd]"], ["world.islands", "3 entries", "2 ranks"]),
    (["world.islands=[0.5,1]"], ["world.islands", "0.5"]),
    (["world.transport=carrier_pigeon"], ["carrier_pigeon", "torchdist", "islands"]),
    (["world.transport=torchdist", "dispatch.dedup=island"], ["dedup=island", "world.transport=islands"]),
    (["world.transport=torchdist", "dispatch.cross_dtype=int8"], ["cross_dtype", "world.transport=islands"]),
    (["dispatch.cross_dtype=fp8"], ["fp8", "null", "int8"]),
    (["dispatch.overlap=perhaps"], ["perhaps", "auto", "true"]),
    (["dispatch.overlap=false", "dispatch.overlap_chunks=2"], ["overlap_chunks=2", "dispatch.overlap=true"]),
])
def test_impossible_combinations_are_refused_with_numbers(overrides, words):
    with pytest.raises(ConfigError) as error:
        check_config(config_from_dict({}, overrides), 2)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_resolved_yaml_reads_back_equal_and_explains_every_key(tmp_path):
    config = config_from_dict({}, ["placement.counts=[5,3]", "data.path=some where", "train.eps=1e-9", "name='1e5'",
                                   "world.islands=[nvidia,amd]", "dispatch.overlap=false"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert_comment_above_every_key(tmp_path / "c.yaml")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        load_config(tmp_path / "none.yaml")
    for text in ("a: [", "- just\n- a list\n", "", "\x00"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError) as error:
            load_config(tmp_path / "bad.yaml")
        assert "\n" not in str(error.value)


def test_help_lists_every_key():
    text = describe_keys()
    for section in dataclasses.fields(Config):
        inner = section.default_factory
        for f in dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else []:
            assert f"{section.name}.{f.name}=" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs(path):
    config = load_config(path)
    check_config(config, len(config.placement.counts or (0, 0)))
    assert_comment_above_every_key(path)


def assert_comment_above_every_key(path: Path) -> None:
    lines = path.read_text().splitlines()
    for above, line in zip([""] + lines, lines):
        if re.match(r"\s*(- )?[\w]+:", line):
            assert above.strip().startswith("#"), f"{path.name}: no comment above {line.strip()!r}"
