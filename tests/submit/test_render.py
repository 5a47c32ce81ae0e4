"""The texts for sbatch are compared with recorded files; MOEDIST_RECORD=1 writes them anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moedist.errors import ConfigError
from moedist.submit.submit import Request, dry_run
from tests.launching import ROOT

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("name", ["nvidia", "mixed-hetjob", "mixed-constraint"])
def test_example_profiles(name):
    text = dry_run(Request(str(ROOT / "configs/quickstart.yaml"), ["folder=/shared/runs"],
                           str(ROOT / f"slurm/clusters/{name}.yaml")))
    file = RECORDED / f"{name}.txt"
    if os.environ.get("MOEDIST_RECORD"):
        file.write_text(text + "\n")
    assert text + "\n" == file.read_text()


def test_array_and_its_members():
    request = Request(str(ROOT / "configs/quickstart.yaml"), ["folder=/shared/runs"], str(ROOT / "slurm/clusters/nvidia.yaml"),
                      each=[["seed=0"], ["seed=1"], ["seed=2"]])
    text = dry_run(request)
    assert text.startswith("# training 0: seed=0\n# training 1: seed=1\n# training 2: seed=2\n\n#!/bin/bash\n")
    assert "#SBATCH --array=0-2\n" in text and "slurm-%A_%a.log" in text
    assert "export MOEDIST_JOB=$folder/$SLURM_ARRAY_TASK_ID\n" in text


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-m", "moedist", "submit", "configs/quickstart.yaml", "--cluster", "slurm/clusters/nvidia.yaml",
               "--dry-run", "model.experts=16"]  # one for every rank: nothing to warn of
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as printing:
        printing.stdout.close()
        assert printing.stderr.read() == "" and printing.wait(timeout=60) == 1


def test_sweep_over_heterogeneous_jobs_is_a_job_each():
    request = Request(str(ROOT / "configs/quickstart.yaml"), ["folder=/shared/runs"],
                      str(ROOT / "slurm/clusters/mixed-hetjob.yaml"), each=[["seed=0"], ["seed=1"]])
    text = dry_run(request)
    assert "# training 0: seed=0\n#!/bin/bash\n" in text and "\n# training 1: seed=1\n#!/bin/bash\n" in text
    assert "--array" not in text and text.count("#SBATCH hetjob") == 2
    assert "export MOEDIST_JOB=$folder/0\n" in text and "export MOEDIST_JOB=$folder/1\n" in text


def test_ranks_without_work_are_told_once_and_unknown_options_refused(capsys):
    def request(*overrides):
        return Request(str(ROOT / "configs/quickstart.yaml"), ["placement.counts=null", *overrides],
                       str(ROOT / "slurm/clusters/mixed-hetjob.yaml"), each=[["seed=0"], ["seed=1"]])

    dry_run(request("model.experts=2", "model.top_k=1"))
    said = capsys.readouterr().err
    assert said.count("experts of a layer") == 1 and said.startswith("warning: ")
    dry_run(request("model.experts=64"))
    assert "experts of a layer" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'treshold', which router topk has not"):
        dry_run(request("router.options.treshold=1"))
