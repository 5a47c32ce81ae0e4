"""`moedist bench routers` from end to end on tiny models: the same start for all, figures, going on, and failures."""

import csv
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch

import moedist.bench.routers.run as bench
from moedist.bench.routers.measures import COMPARABLE, MEASURES
from moedist.bench.routers.report import poster
from moedist.bench.routers.settings import FULL, QUICK, config_of, default_variants
from moedist.cli import main
from moedist.config import check_config
from moedist.coordinator import written_plan
from moedist.errors import ConfigError, MoedistError
from moedist.faults import is_alive
from moedist.phases.train import train_step
from moedist.routing import ROUTERS, check_router
from moedist.trainer import build_run
from moedist.world import World
from tests.launching import start

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.layers=1", "model.width=16", "model.heads=2", "model.expert_hidden=8", "data.tokenizer=byte",
         "data.max_documents=40", "data.sequence_length=24", "train.batch=4", "train.eval_tokens=480"]
TWO = ["topk+bias_rate=0.01", "soft_moe"]


@pytest.fixture(autouse=True)
def tiny(cache, monkeypatch):
    """The token cache of the tests, and less text and fewer timings than the quick mode's."""
    monkeypatch.setenv("MOEDIST_CACHE", str(cache))
    monkeypatch.setattr(bench, "QUICK", dataclasses.replace(QUICK, prompts=4, prompt_tokens=4, new_tokens=10, rounds=2))


def run(out, *variants, seeds=1, steps=5, workers=1, more=(), **options):
    return bench.bench_routers(variants or TWO, True, seeds, steps, workers, str(out), overrides=[*SMALL, *more], **options)


def timeless(figures):
    return {name: value for name, value in figures.items() if "_tps" not in name}


def table_rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_figures_table_and_pictures(tmp_path, capsys):
    figures = run(tmp_path / "out", seeds=2, json_path=str(tmp_path / "f.json"))
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    for name in TWO:
        for figure in ("balance", "utilisation", "generate_tps", "diversity", "stability", "ppl"):
            assert f"routers.{name}.{figure}" in figures
        assert {f.split(".")[-1].removesuffix("_std") for f in figures if f.startswith(f"routers.{name}.")} == set(MEASURES)
        for figure in ("balance", "utilisation", "diversity", "stability", "stability_noise", "self_bleu"):
            assert 0 < figures[f"routers.{name}.{figure}"] <= 1
        assert figures[f"routers.{name}.ppl_std"] > 0 and figures[f"routers.{name}.train_tps"] > 0
        assert all(figures[f"routers.{name}.makespan_over_bound{end}"] >= 1 - 1e-9 for end in ("", "_equal"))
    assert figures["routers.soft_moe.balance"] == 1
    rows = table_rows(tmp_path / "out" / "table.csv")
    assert [(row["router"], row["causal"], row["seeds"]) for row in rows] == [(TWO[0], "True", "2"), (TWO[1], "False", "2")]
    assert float(rows[0]["ppl"]) == figures[f"routers.{TWO[0]}.ppl"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "`soft_moe` \\*" in text and "not causal" in text and "Quick mode" in text
    assert all(f"**{m.head}**" in text for m in MEASURES.values() if m.head)
    assert f"{figures[f'routers.{TWO[0]}.ppl']:.2f} ± {figures[f'routers.{TWO[0]}.ppl_std']:.2f}" in text
    for name in ("balance_perplexity", "tokens_per_s", "stability"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    # the trained model of the first seed is a run like any other
    (trained,) = (tmp_path / "out" / "runs").glob("soft_moe-seed0-*")
    main(["generate", str(trained), "--prompt", "def ", "--max-tokens", "2"])
    assert "def " in capsys.readouterr().out


@pytest.mark.timeout(600)  # it starts two processes that import all anew
def test_a_bench_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    three = [*TWO, "hash"]
    whole, done = timeless(run(tmp_path / "whole", *three)), []

    def cut_off(job, do=bench.do):
        if done:
            raise KeyboardInterrupt
        done.append(job.variant)
        return do(job)

    with monkeypatch.context() as patch:
        patch.setattr(bench, "do", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", *three)
    capsys.readouterr()
    kept = (tmp_path / "out" / "results" / f"{TWO[0]}-seed0.json").read_text()
    again = timeless(run(tmp_path / "out", *three, workers=2))  # in two processes
    assert again.keys() == whole.keys() and all(math.isclose(again[f], whole[f], rel_tol=1e-6) for f in whole)
    assert "1 of 3 trainings were done before" in capsys.readouterr().out
    assert (tmp_path / "out" / "results" / f"{TWO[0]}-seed0.json").read_text() == kept
    # a model that is gone is trained again, other settings are refused
    shutil.rmtree(next((tmp_path / "out" / "runs").glob("hash-seed0-*")))
    more = timeless(run(tmp_path / "out", "hash"))
    assert all(math.isclose(value, whole[f], rel_tol=1e-6) for f, value in more.items())
    with pytest.raises(MoedistError, match="steps was 5, is 6"):
        run(tmp_path / "out", steps=6)
    with pytest.raises(MoedistError, match="config.model.top_k was 2, is 1"):
        run(tmp_path / "out", more=["model.top_k=1"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="children are found in /proc")
def test_no_worker_outlives_the_command(tmp_path, cache):
    command = start(1, cache, "bench", "routers", "--quick", "--workers", "2", "--steps", "100000", "--out",
                    str(tmp_path / "out"), "--routers", ",".join(TWO), *SMALL)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "out" / "runs").glob("*-seed0-*"))) < 2 and time.monotonic() < deadline:
            assert command.poll() is None
            time.sleep(0.1)
        workers = [int(pid) for pid in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()]
    finally:
        command.kill()  # no word of farewell
        command.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


def test_an_unknown_option_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match="'treshold'.*did you mean 'threshold'"):
        run(tmp_path / "out", "topk", "top_p+treshold=0.3")
    assert not list((tmp_path / "out").glob("runs/*"))


def test_a_router_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    broken = "expert_choice+capacity_factor=0"
    with pytest.raises(MoedistError, match=r"1 of 2 trainings failed: expert_choice\S*, seed 0: .*capacity_factor is 0"):
        run(tmp_path / "out", broken, "hash", json_path=str(tmp_path / "f.json"))
    rows = table_rows(tmp_path / "out" / "table.csv")
    assert "capacity_factor" in rows[0]["errors"] and rows[0]["ppl"] == "nan" and float(rows[1]["ppl"]) > 1
    assert {name.split(".")[1] for name in json.loads((tmp_path / "f.json").read_text())} == {"hash"}
    out = capsys.readouterr().out
    assert f"`{broken}`: failed: seed 0: router.capacity_factor is 0" in out and f"| `{broken}` \\* | failed |" in out
    with pytest.raises(SystemExit) as ended:
        main(["bench", "routers", "--quick", "--workers", "1", "--steps", "2", "--routers", broken, *SMALL])
    assert ended.value.code == 1


def test_divergence_is_an_error_of_that_router(tmp_path):
    with pytest.raises(MoedistError, match="training has diverged: loss nan"):
        run(tmp_path / "out", "topk+train.lr=1e15+train.clip=0+train.warmup_steps=0", steps=3)


def test_unknown_things_are_refused_before_training(tmp_path):
    for more, what in ((["model.widht=3"], "did you mean 'model.width'"), (["train.lr"], "has no '='")):
        with pytest.raises(ConfigError, match=what):
            run(tmp_path / "out", more=more)
    with pytest.raises(ConfigError, match="there is no router 'tpk'"):
        run(tmp_path / "out", "hash", "tpk")
    assert not (tmp_path / "out").exists()


def test_all_start_from_the_same_weights_and_read_the_same_text(tmp_path):
    found = {}
    for name in ("topk", "hash", "switch", "shared_expert", "expert_choice"):
        config = config_of(QUICK, name, 3, str(tmp_path), SMALL)
        with World.start(config.world) as world:
            opened = build_run(config, world, written_plan(config, 1, None)[0])
            weights = {k: v.clone() for k, v in opened.model.named_state().items() if "router" not in k and "shared" not in k}
            batches = [batch.ids_GS for _ in range(2) for batch, _ in opened.batches(opened.progress.step,
                                                                                     opened.progress.sequences)
                       if train_step(opened)]
            opened.recorder.close()
        found[name] = weights, batches
    first, read = found["topk"]
    assert any(".experts." in name for name in first)
    for weights, batches in found.values():
        assert weights.keys() == first.keys() and all(torch.equal(weights[k], first[k]) for k in first)
        assert all(torch.equal(a, b) for a, b in zip(batches, read))


@pytest.mark.parametrize("budget", [FULL, QUICK], ids=["full", "quick"])
def test_every_router_has_what_it_needs(budget):
    assert set(ROUTERS) < set(default_variants())
    for variant in default_variants():
        config = config_of(budget, variant, 0, "x")
        check_config(config, 1)
        check_router(config)


def test_the_poster_has_eight_routers():
    assert set(poster()) <= set(ROUTERS) and len(poster()) == 8
    assert all(set(row) == set(COMPARABLE) for row in poster().values())
