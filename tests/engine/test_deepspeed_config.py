"""What is given to DeepSpeed, what a user may set there, and what is refused before any rank starts."""

import json
import sys

import pytest

from moedist.config import check_config, config_from_dict
from moedist.config.schema import EngineConfig
from moedist.engine import check_deepspeed
from moedist.engine.deepspeed_config import OWNED, deepspeed_json, refuse_old
from moedist.errors import ConfigError


def settings(tmp_path, tree, **engine):
    path = tmp_path / "mine.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return deepspeed_json(EngineConfig("deepspeed", config=str(path), **engine))


def test_what_moedist_decides():
    found = deepspeed_json(EngineConfig("deepspeed", zero_stage=2, offload="cpu"))
    assert found["gradient_clipping"] == 0 and found["gradient_accumulation_steps"] == 1
    assert found["communication_data_type"] == "fp32" and not {"fp16", "bf16", "optimizer", "scheduler"} & found.keys()
    assert found["zero_optimization"]["stage"] == 2 and found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert deepspeed_json(EngineConfig("deepspeed"))["zero_optimization"]["stage"] == 1
    assert deepspeed_json(EngineConfig("deepspeed", zero_stage=0))["zero_optimization"]["stage"] == 0


def test_the_users_file_is_merged(tmp_path):
    mine = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": False,
                                  "offload_optimizer": {"device": "none"}},
            "wall_clock_breakdown": True, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "train_batch_size": "auto",
            "gradient_clipping": "auto"}
    found = settings(tmp_path, mine, zero_stage=3)
    assert found["wall_clock_breakdown"] and found["gradient_clipping"] == 0 and not {"bf16", "fp16"} & found.keys()
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000 and found["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in found["zero_optimization"]
    pinned = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert settings(tmp_path, pinned, offload="cpu")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


VALUES = {"train_batch_size": 32, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0, "bf16": {"enabled": True},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization.stage": 2,
          "zero_optimization.offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("name", OWNED)
def test_what_moedist_decides_is_refused_there(tmp_path, name):
    *section, leaf = name.split(".")
    tree = {leaf: VALUES.get(name, 2)}
    with pytest.raises(ConfigError, match=rf"mine.json sets {name} to .*set ") as refused:
        settings(tmp_path, {section[0]: tree} if section else tree, zero_stage=1)
    assert OWNED[name] in str(refused.value)


@pytest.mark.parametrize("text, words", [("{", "is not JSON"), ("[1]", "must hold an object"),
                                         ('{"zero_optimization": 3}', "must hold an object")])
def test_files_that_are_none_are_told(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, text)


@pytest.mark.parametrize("engine, more, words", [
    ({"name": "deepspeeed"}, {}, "choose one of torch, deepspeed"),
    ({"name": "deepspeed", "zero_stage": 4}, {}, "engine.zero_stage is 4; choose 0, 1, 2 or 3"),
    ({"name": "deepspeed", "zero_stage": 0, "offload": "cpu"}, {}, "engine.zero_stage is 0; set engine.zero_stage=1"),
    ({"name": "deepspeed", "offload": "nvme"}, {}, "choose one of none, cpu"),
    ({"name": "deepspeed", "offload": "cpu"}, {"world": {"device": "cpu"}}, "brings nothing with world.device=cpu"),
    ({"name": "deepspeed"}, {"train": {"dtype": "float64"}}, "train.dtype=float64 needs engine.name=torch"),
    ({"zero_stage": 3}, {}, "engine.zero_stage=3 is for engine.name=deepspeed.*or engine.zero_stage=null"),
    ({"config": "a.json"}, {}, "engine.config=a.json is for engine.name=deepspeed"),
    ({}, {"train": {"optimizer": "adam"}}, "choose one of adamw, sgd")])
def test_what_cannot_be_is_refused(engine, more, words):
    with pytest.raises(ConfigError, match=words):
        check_config(config_from_dict({"engine": engine, **more}), 2)


def test_a_missing_file_or_deepspeed_is_told_before_ranks_start(monkeypatch, tmp_path):
    check_deepspeed(config_from_dict({"train": {"lr": 1.0}}))  # the torch engine needs neither
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"pip install 'moedist\[deepspeed\]'"):
        check_deepspeed(config_from_dict({"engine": {"name": "deepspeed"}}))


def test_an_old_deepspeed_is_told():
    with pytest.raises(ConfigError, match="needs DeepSpeed 0.19 or later, but 0.18.9 is installed"):
        refuse_old("0.18.9")
    refuse_old("0.19.0+cu128")
    refuse_old("1.0")


def test_a_missing_json_file_is_told_before_ranks_start(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'moedist[deepspeed]')")
    with pytest.raises(ConfigError, match="no readable file .*none.json .No such file"):
        check_deepspeed(config_from_dict({"engine": {"name": "deepspeed", "config": str(tmp_path / "none.json")}}))
