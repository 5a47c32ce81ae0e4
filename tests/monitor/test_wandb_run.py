"""A run of 30 steps on two ranks, offline: what its .wandb file holds is what the JSONL has; resumed, it goes on."""

import gzip
import json
import os
import shutil
import signal
import subprocess

import pytest
import yaml

from moedist import __version__ as moedist_version
from moedist.monitor import METRICS
from moedist.monitor.metrics import RANK_SERIES, declaration, is_declared
from moedist.monitor.dashboard import dashboard, make_dashboard, workspace_of
from tests.launching import ROOT, TINY, command, environment, moedist, wait_for_step
from tests.monitor.wandb_file import history, records
from tests.watched_run import STEPS

# each of the two ranks is an island: none sends inside one
# nothing travels inside islands of one rank, and no expert is outside the device
NOT_HERE = {"comm/layer.*/own_island_bytes", "comm/layer.*/own_island_ms",
            *(name for name in METRICS if name.startswith("offload/"))}


def wandb_files(run):
    """The .wandb files of a run folder, oldest first; those of single ranks apart."""
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [f for f in files if "rank" not in f.name], [f for f in files if "rank" in f.name]


def jsonl(run):
    """step -> all values of metrics.jsonl, as Weights & Biases adds up several calls for a step."""
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "alert" not in line:
            found.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k != "step" and v is not None})
    return found


def of_kind(file, kind):
    return [getattr(record, kind) for record in records(file) if record.WhichOneof("record_type") == kind]


def test_every_declared_metric_is_there_with_the_values_of_the_jsonl(watched):
    (file,), _ = wandb_files(watched)
    theirs, ours = history(file), jsonl(watched)
    assert set(ours) <= set(theirs) and max(ours) == STEPS
    for step, values in ours.items():
        assert {name: theirs[step][name] for name in values} == values
    seen = {name for values in ours.values() for name in values}
    declared = {declared for declared in METRICS if any(declaration(name) is METRICS[declared] for name in seen)}
    assert set(METRICS) - declared == NOT_HERE
    assert {f"rank/{r}/{name}" for r in (0, 1) for name in RANK_SERIES} <= seen
    assert all(values["train/tokens"] == step * 8 * 32 for step, values in ours.items())


def test_metrics_agree_with_each_other(watched):
    ours = jsonl(watched)
    for values in (ours[step] for step in range(5, STEPS + 1, 5)):
        assert values["perf/memory_gib"] == max(values["rank/0/memory_gib"], values["rank/1/memory_gib"])
        assert values["moe/expert_ms"] == max(values["rank/0/expert_ms"], values["rank/1/expert_ms"]) > 0
        assert values["rank/0/rows"] + values["rank/1/rows"] == 2 * 2 * 8 * 32  # layers, top-k, sequences, their length
        assert values["rank/0/tokens"] + values["rank/1/tokens"] == 8 * 32
        assert values["perf/slowest_rank_name"].startswith(f"rank {values['perf/slowest_rank']:.0f} (")
        assert 0 < values["perf/mfu"] < 1 and values["perf/expert_over_bound"] >= 0.999
        for r in (0, 1):
            parts = sum(values[f"rank/{r}/{name}"] for name in ("expert_ms", "dense_ms", "all_to_all_ms", "wait_ms"))
            # rank 0's clock is that of perf/step_ms; the other one waits in its steps for what rank 0 does between them
            assert 0 < parts and (r or parts <= 1.001 * values["perf/step_ms"])
    loads = [json.loads(line) for line in (watched / "loads.jsonl").read_text().splitlines()]
    assert [sum(line["loads"]["0"]) for line in loads] == [5 * 2 * 8 * 32] * 6
    assert ours[20]["plan/version"] == 1 and ours[25]["plan/version"] >= 1 and 0 <= ours[20]["moe/routing_stability"] <= 1


def test_configuration_commit_devices_tables_pictures_and_artifacts(watched):
    (file,), ranks = wandb_files(watched)
    (started,) = of_kind(file, "run")
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["model"]["expert_hidden"] == 24 and config["moedist_version"] == moedist_version
    if (ROOT / ".git").exists():
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
        assert config["git_commit"].removesuffix("+") == commit
    assert [name.split(", ")[1] for name in config["devices"]] == ["cpu", "cpu"]
    assert started.run_group == "watched" and started.run_id == (watched / "wandb_id").read_text().strip()
    values = {name: value for step in history(file).values() for name, value in step.items()}
    tables = {name: json.loads((file.parent / "files" / values[f"{name}.path"]).read_text())
              for name in ("plan/owners", "plan/ranks")}
    assert len(tables["plan/owners"]["data"]) == 2 * 8 and len(tables["plan/ranks"]["data"]) == 2
    for name in ("pictures/widths", "pictures/fisher"):
        assert (file.parent / "files" / values[f"{name}.path"]).read_bytes().startswith(b"\x89PNG")
    assert of_kind(file, "artifact") and all(a.type == "model" and len(a.manifest.contents) > 3
                                             for a in of_kind(file, "artifact") if a.type == "model")
    metrics = [m for m in of_kind(file, "metric") if m.glob_name == "*"]
    assert metrics and metrics[0].step_metric == "train/tokens"
    # one more run for the second rank, with what that did
    (other,) = ranks
    assert of_kind(other, "run")[0].run_group == watched.name
    assert {f"rank/{name}" for name in RANK_SERIES} <= history(other)[STEPS].keys()
    assert history(other)[STEPS]["rank/expert_ms"] == pytest.approx(jsonl(watched)[STEPS]["rank/1/expert_ms"])


def test_profile_has_a_trace_a_rank_and_a_table(watched):
    folder = watched / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.trace.json.gz", "rank-1.trace.json.gz", "summary.txt"]
    lines = [line.split() for line in (folder / "summary.txt").read_text().splitlines()]
    assert lines[0] == ["region", "rank", "0", "rank", "1"]
    assert [line[0] for line in lines[1:]] == ["route", "dispatch", "experts", "combine", "dense", "backward", "optimizer"]
    assert all(float(ms) > 0 for line in lines[1:] for ms in line[1:])
    events = json.loads(gzip.open(folder / "rank-1.trace.json.gz").read())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    # two layers, two steps; own rows are computed first, while others travel
    assert {name: names.count(name) for name in ("route", "dispatch", "combine", "optimizer")} == \
        {"route": 4, "dispatch": 4, "combine": 8, "optimizer": 2}


def test_a_resumed_run_continues_id_and_step(watched, cache, tmp_path):
    run = tmp_path / watched.name
    shutil.copytree(watched, run)
    phases = [*yaml.safe_load((run / "config.yaml").read_text())["phases"], {"train": 5}]
    moedist(2, cache, "train", "--resume", run, f"phases={json.dumps(phases)}", "monitor.wandb_ranks=false",
            "monitor.artifacts=false")
    first, second = wandb_files(run)[0]
    ids = [of_kind(file, "run")[0].run_id for file in (first, second)]
    assert ids[0] == ids[1] and first != second
    theirs = history(second)
    assert max(theirs) == STEPS + 5 and min(step for step, values in theirs.items() if "train/loss" in values) == STEPS + 5
    assert theirs[STEPS + 5]["train/loss"] == jsonl(run)[STEPS + 5]["train/loss"]
    assert theirs[STEPS + 5]["train/tokens"] == (STEPS + 5) * 8 * 32


def test_dashboard_shows_declared_metrics(monkeypatch, tmp_path):
    found = dashboard("mine", ranks=3)
    shown = [name for section in found["sections"] for panel in section["panels"] for name in panel["y"]]
    assert all(map(is_declared, shown)) and {"rank/0/busy_ms", "rank/2/busy_ms"} <= set(shown)
    # those of offload come from evaluations, which have no Weights & Biases run
    left_out = ("train/tokens", "moe/expert_ms", "perf/logging_ms", "perf/slowest_rank_name")
    whole = {name for name in METRICS if "*" not in name and not name.startswith("offload/") and name not in left_out}
    assert whole == {name for name in shown if not name.startswith("rank/")}
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert json.loads(make_dashboard(None, "p", "mine", 3, None)) == found
    make_dashboard(None, "p", "mine", 3, str(tmp_path / "d.json"))
    assert json.loads((tmp_path / "d.json").read_text()) == found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their library's own parts
def test_dashboard_is_one_that_their_library_accepts():
    workspace = workspace_of(dashboard("mine", ranks=2), "somebody", "moedist")
    assert [section.name for section in workspace.sections][:2] == ["Training", "Speed"]
    assert workspace.sections[0].panels[0].x == "train/tokens"


def test_a_training_outlives_weights_and_biases(tmp_path, cache):
    """Slurm's signals reach its process too, before the ranks have saved."""
    arguments = command(1, "train", "configs/quickstart.yaml", *TINY, "phases=[{train: 5000}]", "checkpoint.every=0",
                        "monitor.wandb=offline", f"folder={tmp_path}")
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    run = wait_for_step(tmp_path, 2, process)
    theirs = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid), "wandb-core"], capture_output=True,
                                                 text=True).stdout.split()]
    assert theirs
    for pid in theirs:
        os.kill(pid, signal.SIGKILL)
    wait_for_step(tmp_path, max(jsonl(run)) + 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert out.count("warning: Weights & Biases is gone") == 1 and "stopped by a signal" in out
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
