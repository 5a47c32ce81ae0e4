"""Profiles that cannot be are refused before Slurm is asked, in one line that says what to do."""

import doctest
import sys

import pytest

import moedist.submit.executor
import moedist.submit.life
import moedist.submit.profile
import moedist.submit.queue
from moedist.errors import ConfigError
from moedist.submit.profile import read_profile
from tests.launching import ROOT


def read(tmp_path, text, **more):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return read_profile(path, **more)


KIND = "kinds: [{name: a, nodes: 2}, {name: b, nodes: 3, min_nodes: 3}]\n"


def test_doctests():
    for module in (moedist.submit.profile, moedist.submit.executor, moedist.submit.queue, moedist.submit.life):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", ["nvidia", "mixed-hetjob", "mixed-constraint"])
def test_examples_are_profiles_with_a_comment_above_every_key(name):
    path = ROOT / f"slurm/clusters/{name}.yaml"
    profile = read_profile(path)
    assert profile.kinds
    lines, told = path.read_text().splitlines(), set()
    for before, line in zip(lines, lines[1:]):
        key = line.strip().removeprefix("- ").split(":")[0]
        if line.strip() and not line.strip().startswith("#") and key != "kinds":
            assert before.strip().startswith("#") or key in told, f"{name}: no comment above {line!r}"
            told.add(key)


@pytest.mark.parametrize("text, message", [
    ("kinds: []\ntime: '1'\n", "names no nodes"),
    ("kinds: [{name: a, partitions: x}]\n", "did you mean 'partition' of an entry of kinds? (moedist submit --help"),
    ("kinds: [{name: a}]\nacount: x\n", "unknown key 'acount' in {path}; did you mean 'account'?"),
    ("kinds: [{name: job}]\n", "a kind is called job, as scripts of a job are"),
    ("kinds: [{name: a, nodes: two}]\n", "nodes"),
    ("kinds: [{name: 'a b'}]\n", "letters, digits and -"),
    ("kinds: [{name: a}, {name: a}]\n", "2 kinds are called a"),
    ("kinds: [{name: a, nodes: 0}]\n", "nodes: 0; it must be 1 or more"),
    ("kinds: [{name: a, nodes: 1, min_nodes: 2}]\n", "min_nodes: 2 above nodes: 1"),
    ("kinds: [{name: a}]\ntime: tomorrow\n", "'tomorrow' is not a time limit"),
    ("kinds: [{name: a}]\ntime: '5:00'\n", "signal_s (300 s) must be below its time limit"),
    ("kinds: [{name: a}]\nform: array\n", "choose one of auto, hetjob, constraint"),
    ("kinds: [{name: a, python: /no/such/python}]\n", "there is no interpreter /no/such/python"),
    ("kinds: [{name: a, venv: /no/such/venv}]\n", "no Python in its venv /no/such/venv"),
    ("kinds: [{name: a, constraint: x, partition: p}, {name: b, constraint: y, partition: q}]\nform: constraint\n",
     "partition must be the same for all kinds, not p, q"),
    ("kinds: [{name: a, constraint: x}, {name: b}]\nform: constraint\n", "set constraint of b"),
])
def test_what_cannot_be(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message.format(path=tmp_path / "site.yaml") in str(error.value) and "\n" not in str(error.value)


def test_interpreters_that_only_nodes_see(tmp_path):
    read(tmp_path, "kinds: [{name: a, venv: /no/such/venv}]\ncheck_python: false\n")
    read(tmp_path, f"kinds: [{{name: a, python: {sys.executable}}}]\n")


def test_other_numbers_of_nodes(tmp_path):
    profile = read(tmp_path, KIND, nodes={"b": 1}, time="10:00:00")
    assert [(k.nodes, k.min_nodes) for k in profile.kinds] == [(2, None), (1, 1)] and profile.time == "10:00:00"
    assert [k.name for k in read(tmp_path, KIND, nodes={"a": 0}).kinds] == ["b"]
    with pytest.raises(ConfigError, match="no kind called c; it has a, b"):
        read(tmp_path, KIND, nodes={"c": 1})
