"""Clusters that are not here: read, refused, made from measured ranks, and enlarged."""

import dataclasses
import json

import pytest

from moedist.coordinator.cluster_file import alike, cluster_yaml, facts_of, kinds_of, read_cluster, with_one_more_node
from moedist.coordinator.facts import facts_from_json, facts_to_json
from moedist.coordinator.probe_table import describe, describe_calls
from moedist.errors import ConfigError
from tests.coordinator.ranks_of import facts_of as ranks_of
from tests.launching import ROOT

GOOD = """
kinds:
  - name: fast
    ranks: 4
    ranks_per_node: 2
    vendor: nvidia
    expert_rows_per_s: 4e6
    dense_tokens_per_s: 1e6
    memory_gib: 70.5
    link_gb_per_s: 20
  - {name: slow, ranks: 2, vendor: amd, expert_rows_per_s: 1e6, expert_call_s: 1e-4, dense_tokens_per_s: 2e5, memory_gib: 14}
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> str:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return str(path)
    return to_file


def test_kinds_are_read_and_spread_out_into_ranks(write):
    kinds = read_cluster(write(GOOD))
    facts = facts_of(kinds)
    assert [f.rank for f in facts] == list(range(6)) and [f.host for f in facts] == [
        "fast-0", "fast-0", "fast-1", "fast-1", "slow-0", "slow-1"]
    assert [f.island for f in facts] == [0, 0, 0, 0, 1, 1] and {f.expert_rows_per_s for f in facts[:4]} == {4e6}
    assert facts[0].free_bytes == 70.5 * 2**30 and facts[0].alltoall_bytes_per_s == 20e9 and facts[5].expert_call_s == 1e-4


def test_one_more_node_brings_its_ranks(write):
    kinds = read_cluster(write(GOOD))
    facts = facts_of(kinds)
    bigger = with_one_more_node(facts, kinds[0])
    assert bigger[:6] == facts and [f.rank for f in bigger] == list(range(8))
    assert {(f.device_name, f.island, f.expert_rows_per_s) for f in bigger[6:]} == {("fast", 0, 4e6)}
    other = with_one_more_node(facts, dataclasses.replace(kinds[0], vendor="intel"))
    assert [f.island for f in other] == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("text, words", [
    ("kinds: []", ["describes no ranks", "configs/clusters/mixed.yaml"]),
    (GOOD.replace("memory_gib: 70.5", "memory_gib: 0"), ["kinds[0] (fast)", "memory_gib=0", "moedist probe"]),
    (GOOD.replace("expert_rows_per_s: 1e6, ", ""), ["kinds[1] (slow)", "expert_rows_per_s=0"]),
    (GOOD.replace("ranks: 4", "ranks: -4"), ["ranks=-4"]),
    (GOOD.replace("expert_rows_per_s: 4e6", "expert_rows_per_s: .inf"), ["expert_rows_per_s=inf"]),
    (GOOD.replace("link_gb_per_s: 20", "link_gb_per_s: -1"), ["link_gb_per_s=-1"]),
    (GOOD.replace("name: slow", "name: fast"), ["several kinds are called fast"]),
    (GOOD.replace("memory_gib: 14", "memory_gb: 14"), ["memory_gb", "memory_gib", "moedist plan --help lists the keys"]),
    (GOOD.replace("memory_gib: 70.5", "memory_gib: much"), ["memory_gib"]),
])
def test_what_is_wrong_is_named(write, text, words):
    with pytest.raises(ConfigError) as caught:
        read_cluster(write(text))
    for word in words:
        assert word in str(caught.value), caught.value


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="no/cluster.yaml.*configs/clusters/mixed.yaml"):
        read_cluster("no/cluster.yaml")


def test_the_cluster_that_comes_with_the_project_is_readable():
    assert len(facts_of(read_cluster(ROOT / "configs/clusters/mixed.yaml"))) == 24


def test_measured_ranks_become_kinds_that_are_read_back(write):
    facts = ranks_of([100.0, 104.0, 25.0, 96.0, 24.0], [50.0, 52.0, 20.0, 48.0, 20.0])
    facts = [dataclasses.replace(f, host=f"node{f.rank // 2}", alltoall_latency_s=1.23456e-5) for f in facts]
    kinds = kinds_of(facts)
    assert [(k.ranks, k.ranks_per_node, k.expert_rows_per_s, k.dense_tokens_per_s) for k in kinds] == [
        (3, 2, 100.0, 50.0), (2, 1, 24.5, 20.0)]
    assert [k.name for k in kinds] == ["cpu", "cpu (2)"]
    read = read_cluster(write(cluster_yaml(kinds, "measured")))
    assert [dataclasses.replace(k, link_latency_s=1.235e-5) for k in kinds] == read
    assert alike(facts) == [[0, 1, 3], [2, 4]]


def test_names_are_quoted(write):
    facts = [dataclasses.replace(f, device_name='A: "B" #c') for f in ranks_of([1.0])]
    assert read_cluster(write(cluster_yaml(kinds_of(facts), "x")))[0].name == 'A: "B" #c'


def test_ranks_of_another_device_are_another_kind_however_fast():
    facts = ranks_of([100.0, 100.0])
    assert alike([facts[0], dataclasses.replace(facts[1], device_name="gpu")]) == [[0], [1]]
    assert alike([facts[0], dataclasses.replace(facts[1], dense_tokens_per_s=60.0)]) == [[0], [1]]


def test_facts_are_read_back_from_json():
    facts = ranks_of([8.0, 1.5], measured=False)
    text = facts_to_json(facts)
    assert facts_from_json(text) == facts
    assert [entry["expert_rows_per_s"] for entry in json.loads(text)] == [8.0, 1.5]


def test_tables_have_a_line_a_rank_or_one_a_kind_where_there_are_many():
    facts = ranks_of([8000.0, 2000.0])
    assert [line.split()[0] for line in describe(facts).splitlines()] == ["rank", "0", "1"]
    assert "0.250" in describe(facts) and "1,000" in describe_calls(facts)  # 1e9 bytes/s
    many = ranks_of([8000.0] * 30 + [2000.0] * 30 + [8000.0])
    lines = describe(many).splitlines()
    assert len(lines) == len(describe_calls(many).splitlines()) == 3
    assert lines[1].startswith("0-29, 60") and lines[2].split()[0] == "30-59"
    assert "given" in describe(ranks_of([8.0, 1.0], measured=False))
