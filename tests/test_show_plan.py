"""`moedist plan`: for clusters that are not here, of any size, and for this machine."""

import json
import time

import pytest

from moedist.errors import CheckpointError
from moedist.placement import Plan, split_batch
from moedist.show_plan import show_plan, zipf_loads
from tests.coordinator.test_sizes import TREE, VOCAB
from tests.launching import ROOT, TINY, moedist

MIXED = str(ROOT / "configs/clusters/mixed.yaml")
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def shown(capsys, tmp_path, cluster, *overrides, zipf=0.6):
    """(what was printed, what was written)."""
    path = tmp_path / "plan.json"
    show_plan(QUICKSTART, overrides, cluster, zipf, None, str(path))
    return capsys.readouterr().out, json.loads(path.read_text())


def test_a_cluster_that_is_not_here(capsys, tmp_path):
    out, figures = shown(capsys, tmp_path, MIXED, "model.experts=64", "train.batch=256", "placement.max_copies=8",
                         "placement.experts_in_every_island=false")
    plan = Plan.from_json(json.dumps(figures["plan"]))
    assert plan.world_size == 24 and sum(split_batch(256, plan.batch_shares)) == 256
    assert figures["bound_ms"] <= figures["step_ms"] < figures["equal_step_ms"]
    assert list(figures["one_more_node_step_ms"]) == ["fast-gpu", "other-gpu", "old-gpu"]
    assert figures["one_more_node_step_ms"]["fast-gpu"] < figures["step_ms"]
    lines = out.splitlines()
    assert "nothing to do" not in out
    assert lines[0].startswith("24 ranks (") and "64 experts in each of 4 layers, batch 256" in lines[0]
    rows = [line.split() for line in lines if line.split()[1:2] and line.split()[1] in ("fast-gpu", "other-gpu", "old-gpu")]
    assert [int(row[0]) for row in rows] == list(range(24))
    held = [sum(len(layer.experts_of_rank(r)) for _, layer in plan.layers) for r in range(24)]
    assert sum(held[:8]) > sum(held[8:16]) > sum(held[16:])  # fast, other, old
    assert f"{figures['equal_step_ms'] / figures['step_ms']:.2f}x as fast as equal placement" in out
    assert f"one more node of other-gpu (8 ranks): {figures['one_more_node_step_ms']['other-gpu']:.2f} ms a step" in out


def test_copies_are_suggested_where_they_would_help(capsys, tmp_path):
    meet = "placement.experts_in_every_island=false"
    out, without = shown(capsys, tmp_path, MIXED, meet)
    assert f"islands meet in every layer: {meet}" in out and "try placement.max_copies=23 (now 0)" in out
    assert "16 of 24 ranks have nothing to do: 8 experts and 32 sequences" in out
    out, copied = shown(capsys, tmp_path, MIXED, "placement.max_copies=23", meet)
    assert copied["step_ms"] < without["step_ms"] and "try placement.max_copies" not in out


def test_islands_that_each_have_all_experts(capsys, tmp_path):
    out, figures = shown(capsys, tmp_path, MIXED)
    assert "islands meet once a step, every one has all experts: " in out
    plan = Plan.from_json(json.dumps(figures["plan"]))
    nvidia, amd = ({e for r in ranks for e in plan.layer(0).experts_of_rank(r)} for ranks in ([*range(8), *range(16, 24)],
                                                                                              range(8, 16)))
    assert nvidia == amd == set(range(8)) and figures["bound_ms"] <= figures["step_ms"]


def test_thousands_of_ranks_take_seconds(capsys, tmp_path):
    cluster = tmp_path / "big.yaml"
    cluster.write_text((ROOT / "configs/clusters/mixed.yaml").read_text().replace("ranks: 8\n", "ranks: 1024\n"))
    start = time.process_time()
    out, figures = shown(capsys, tmp_path, str(cluster), "model.experts=256", "model.layers=16", "model.top_k=8",
                         "train.batch=8192", "placement.max_copies=64")
    assert time.process_time() - start < 20  # 3 on one core
    assert figures["plan"]["world_size"] == 3072 and out.startswith("3072 ranks")
    rows = [line.split()[:2] for line in out.splitlines()[3:6]]
    assert rows == [["0-1023", "fast-gpu"], ["1024-2047", "other-gpu"], ["2048-3071", "old-gpu"]]
    assert figures["step_ms"] < figures["equal_step_ms"]


def test_a_model_without_experts(capsys, tmp_path):
    out, figures = shown(capsys, tmp_path, MIXED, "model.moe_every=0")
    assert figures["plan"]["layers"] == [] and "in each of 0 layers" in out and figures["step_ms"] >= figures["bound_ms"]


def test_even_loads_and_steep_ones():
    from moedist.config import config_from_dict
    from moedist.coordinator import Sizes
    sizes = Sizes.of(config_from_dict(TREE), VOCAB)
    assert zipf_loads(sizes, 0) == {i: [sizes.rows / 6] * 6 for i in range(4)}
    steep = zipf_loads(sizes, 1.0)[0]
    assert sum(steep) == pytest.approx(sizes.rows) and steep[0] == pytest.approx(2 * steep[1]) == pytest.approx(6 * steep[5])


def test_a_run_that_has_no_loads_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no_run"):
        show_plan(QUICKSTART, [], MIXED, 0.6, str(tmp_path / "no_run"), None)


def test_this_machine(tmp_path, cache):
    path = tmp_path / "plan.json"
    done = moedist(2, cache, "plan", "configs/quickstart.yaml", *TINY, "placement.counts=null", "placement.batch_shares=null",
                   "placement.probe_s=0.5", "world.slowdown={0: [4, 16]}", "--zipf", "0", "--json", str(path))
    figures = json.loads(path.read_text())
    plan = Plan.from_json(json.dumps(figures["plan"]))
    assert plan.world_size == 2 and plan.speeds[0] != plan.speeds[1]
    assert "2 ranks (this machine, Zipf 0 loads)" in done.stdout and done.stdout.count("predicted ms of a step") == 1
    assert len(figures["one_more_node_step_ms"]) in (1, 2) and "one more node of" in done.stdout
