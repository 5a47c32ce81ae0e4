"""`moedist probe`: what is measured is shown, written as JSON, and good for `moedist plan --cluster`."""

import json
import subprocess

import pytest

from moedist.coordinator.cluster_file import read_cluster
from moedist.coordinator.facts import facts_from_json
from moedist.errors import ConfigError
from moedist.show_plan import show_plan
from moedist.show_probe import show_probe
from tests.launching import ROOT, TINY, command, moedist

ANYWHERE = [*TINY, "placement.counts=null", "placement.batch_shares=null", "placement.probe_s=0.5"]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def test_two_ranks(tmp_path, cache, capsys):
    facts_path, cluster = tmp_path / "ranks.json", tmp_path / "cluster.yaml"
    done = moedist(2, cache, "probe", "configs/quickstart.yaml", *ANYWHERE, "world.slowdown={0: [4, 16]}",
                   "--json", str(facts_path), "--yaml", str(cluster))
    facts = facts_from_json(facts_path.read_text())
    assert [f.rank for f in facts] == [0, 1] and all(f.measured for f in facts)
    out = done.stdout
    for words in ("2 ranks by torchrun", "expert rows/s", "spread", "expert call ms", "dense call ms", "all-to-all MB/s",
                  "latency us", "host copy MB/s", "free GiB", facts[0].device_name, f"{facts[1].expert_rows_per_s:,.0f}"):
        assert words in out
    assert out.count("rank  host") == 1  # rank 0 alone speaks
    assert cluster.read_text().strip() in out  # ready to be copied from the screen
    kinds = read_cluster(cluster)
    assert sum(kind.ranks for kind in kinds) == 2
    show_plan(QUICKSTART, ANYWHERE, str(cluster), 0.6, None, None)
    assert "2 ranks (" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_alone_with_given_speeds(tmp_path, capsys):
    facts = show_probe(QUICKSTART, [*ANYWHERE, "placement.speeds=[1000]"], None, str(tmp_path / "ranks.json"))
    out = capsys.readouterr().out
    assert out.startswith("1 rank by single process") and "given" in out
    assert json.loads((tmp_path / "ranks.json").read_text())[0]["expert_rows_per_s"] == facts[0].expert_rows_per_s == 1000


def test_a_configuration_that_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="placement.speeds has 2 entries for 1 ranks"):
        show_probe(QUICKSTART, ["placement.speeds=[1,2]"], None, None)


@pytest.mark.parametrize("paths", [("no/folder/c.yaml", None), (None, "no/folder/r.json")])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(paths):
    with pytest.raises(ConfigError, match="there is no folder no/folder"):
        show_probe(QUICKSTART, ANYWHERE, *paths)


def test_help_has_an_example():
    out = subprocess.run(command(1, "probe", "--help"), capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "torchrun --nproc-per-node 2 -m moedist probe configs/quickstart.yaml --yaml cluster.yaml" in out
