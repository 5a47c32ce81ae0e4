"""`moedist inspect --routing`: the same counts on any number of ranks, and what a user sees of a real run."""

import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from moedist.config import config_from_dict
from moedist.data import EvalStream
from moedist.dispatch import build_transport
from moedist.errors import ConfigError
from moedist.inspect_routing import record_routing
from moedist.model import Batch, Transformer
from moedist.phases.calibrate import Source
from moedist.placement import plan_from_config
from moedist.traces.affinity import joint_mass
from moedist.traces.consistency import best_segments, cache_hits, segment_histogram
from moedist.world import World
from tests.launching import moedist
from tests.ranks import run_ranks

LENGTH, SEQUENCES = 8, 7


def model_and_source(world, router):
    config = config_from_dict({"model": {"layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_hidden": 8,
                                         "init_std": 0.4, "dense_blocks": [1]},
                               "data": {"sequence_length": LENGTH}, "router": {"name": router},
                               "placement": {"counts": {1: [4], 2: [3, 1], 3: [2, 0, 2]}[world.size]}})
    model = Transformer(config, 20, plan_from_config(config, world.size), build_transport(world), torch.device("cpu"),
                        torch.float64)
    stream = EvalStream(np.random.default_rng(0).integers(0, 20, LENGTH * SEQUENCES + 1), LENGTH)
    return model.eval(), Source(stream, 0, stream.sequences, 3, torch.float64)


def facts(world, router):
    model, source = model_and_source(world, router)
    return record_routing(model, world, source, [0, 2], [2, 8], [1, 3]).facts()


@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_counts_are_those_of_one_pass_over_all(router, one_thread):
    model, source = model_and_source(World(), router)
    routed = {}
    for i in (0, 2):
        dict(model.moe_layers())[i].router.register_forward_hook(lambda _, __, found, i=i: routed.update({i: found}))
    inputs, _ = source.stream.batch(0, SEQUENCES)
    with torch.no_grad():
        model(Batch(inputs, torch.arange(inputs.numel()).view_as(inputs), 0))
    traces = {}
    for i, found in routed.items():
        trace = traces[i] = torch.zeros(SEQUENCES, LENGTH, 4, dtype=torch.bool)
        for t, e in zip(found.token_ids_N.tolist(), found.expert_ids_N.tolist()):
            trace[t // LENGTH, t % LENGTH, e] = True
    found = facts(World(), router)
    assert found["tokens"] == LENGTH * SEQUENCES and [layer["layer"] for layer in found["layers"]] == [0, 2]
    for layer in found["layers"]:
        trace = traces[layer["layer"]]
        assert layer["rows"] == trace.sum((0, 1)).tolist() and 0 < layer["utilisation"] <= 1
        assert 0 < layer["router_entropy"] <= 1
        for segment in layer["segments"]:
            assert segment["srp"] == best_segments(segment_histogram(trace, segment["m"])).srp > 0
            for cache in segment["caches"]:
                assert cache["sch"] == cache_hits(trace, segment["m"], cache["size"]) / int(trace.sum()) > 0
    (pair,) = found["affinity"]
    joint = joint_mass(traces[0], traces[2])
    np.testing.assert_allclose(np.array(pair["conditional"]) * joint.sum(1).unsqueeze(1).numpy(), joint.numpy(), atol=1e-12)
    assert (pair["layer"], pair["next"]) == (0, 2) and pair["tokens"] <= LENGTH * SEQUENCES


def test_any_number_of_ranks(one_thread):
    (alone,) = run_ranks(1, facts, "topk")
    for ranks in (2, 3):
        for part in run_ranks(ranks, facts, "topk"):
            assert flat(part) == pytest.approx(flat(alone), rel=1e-12, abs=1e-12)


def flat(value):
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    return [x for v in value for x in flat(v)] if isinstance(value, list) else [-1.0 if value is None else value]


def test_mixtures_of_tokens_have_no_routing():
    model, source = model_and_source(World(), "soft_moe")
    with pytest.raises(ConfigError, match="mixtures of tokens"):
        record_routing(model, World(), source, [0, 2])


def test_of_a_run_that_was_compressed(watched, cache, tmp_path):
    arguments = ["inspect", str(watched), "train.dtype=float64", "dispatch.cross_dtype=null", "--routing", "--tokens", "600",
                 "--caches", "2", "4"]
    done = moedist(2, cache, *arguments, "--json", f"{tmp_path}/routing.json")
    assert done.stdout.replace(f"\n\npicture {tmp_path}/routing.png", "") == moedist(1, cache, *arguments).stdout
    found = json.loads((tmp_path / "routing.json").read_text())
    assert found["tokens"] == 576 and [s["m"] for s in found["mean"]["segments"]] == [4, 16]
    assert "SCH 4 (static)" in done.stdout and "0 -> 1" in done.stdout
    assert f"{found['mean']['segments'][0]['srp']:.3f}" in done.stdout
    image = imread(tmp_path / "routing.png")
    assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.01
    for wrong, words in ((["--layer", "5"], "layers with experts are 0, 1, not 5"),
                         (["--segments", "64"], "a segment of 64 tokens is longer than sequences, of 32")):
        refused = moedist(1, cache, *arguments, *wrong, ok=False)
        assert words in refused.stderr and "Traceback" not in refused.stderr
