"""Runs with a compress phase, as a user starts them: trained on, resumed, evaluated, compressed again, on other ranks too."""

import json
import shlex
import shutil

import pytest

from tests.launching import QUICKSTART, metrics, moedist, only_run

PHASES = "phases=[{train: 6}, {compress: {method: METHOD, ratio: 0.5, tokens: 512}}, {train: 6}]"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def arguments(folder, method="cur", *more):
    return [*QUICKSTART, f"folder={folder}", PHASES.replace("METHOD", method), "train.dtype=float64", "checkpoint.every=3",
            "checkpoint.keep=9", *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A run on two ranks: six steps, CUR, six steps."""
    folder = tmp_path_factory.mktemp("runs")
    moedist(2, cache, "train", *arguments(folder))
    return only_run(folder)


def test_the_run_tells_what_it_did(run):
    told = json.loads((run / "compression-00000006.json").read_text())
    assert 0.5 <= told["ratio"] < 0.7 and len(told["experts"]) == 16
    for e in told["experts"]:
        assert e["hidden"] in (8, 16, 24) and e["hidden_before"] == 24 and e["rank"] == (0 if e["expert"] < 5 else 1)
        assert 0 <= e["fisher_kept"] <= 1 + 1e-9 and (e["hidden"] < 24 or e["fisher_kept"] == 1)
    assert sum(e["rows"] for e in told["experts"]) == 2 * 512 * 2  # layers, tokens, K
    assert metrics(run, "compress/ratio") == {6: told["ratio"]}
    assert sorted(metrics(run)) == list(range(1, 13))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resumed_right_after_the_phase_it_gives_the_same_losses(run, cache, tmp_path, ranks):
    copy = tmp_path / run.name
    copy.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    shutil.copytree(run / "checkpoints" / "step-00000006", copy / "checkpoints" / "step-00000006")
    done = moedist(ranks, cache, "train", "--resume", str(copy))
    assert "compressed" not in done.stdout, "the phase is done already"
    before, after = metrics(run), metrics(copy)
    for step in range(7, 13):
        assert after[step] == pytest.approx(before[step], rel=0 if ranks == 2 else 1e-9), step


def test_killed_before_the_phase_it_is_compressed_when_resumed(run, cache, tmp_path):
    copy = tmp_path / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step-0000000[69]", "step-00000012", "compression*"))
    done = moedist(2, cache, "train", "--resume", str(copy))
    assert "compressed 16 experts by cur" in done.stdout
    assert metrics(copy) == metrics(run)


def test_one_rank_trains_the_same(run, cache, tmp_path):
    moedist(1, cache, "train", *arguments(tmp_path, "cur", "placement.counts=null", "placement.batch_shares=null"))
    alone = metrics(only_run(tmp_path))
    for step, loss in metrics(run).items():
        assert alone[step] == pytest.approx(loss, rel=1e-6), step


def test_evaluate_generate_and_compress_open_it(run, cache, tmp_path):
    assert "perplexity" in moedist(1, cache, "evaluate", str(run), "train.batch=256").stdout
    assert "perplexity" in moedist(3, cache, "evaluate", str(run), "train.batch=256").stdout
    assert moedist(1, cache, "generate", str(run), "--prompt", "def ", "--max-tokens", "3").stdout.startswith("def ")
    done = moedist(1, cache, "compress", str(run), "--ratio", "0.4", "--option", "options.multiple=1", "--step", "9",
                   "--tokens", "512", f"folder={tmp_path}")
    again = only_run(tmp_path)
    assert "moedist evaluate" in done.stdout and again.name.startswith("quickstart-cur-")
    told = json.loads((again / "compression-00000009.json").read_text())
    assert told["ratio"] == pytest.approx(0.4, abs=0.02) and all(e["hidden_before"] < 25 for e in told["experts"])
    # what was left of the cut train phase goes on behind the compression
    assert "{train: 3}, {compress:" in (again / "config.yaml").read_text()
    moedist(2, cache, "train", "--resume", str(again))
    assert sorted(metrics(again)) == [10, 11, 12]


def test_a_measured_run_is_measured_again_and_distilled(cache, tmp_path):
    phases = "phases=[{train: 3}, {compress: {method: cur-hybrid, ratio: 0.6, tokens: 512, distill_steps: 5}}, {train: 3}]"
    done = moedist(2, cache, "train", *QUICKSTART, f"folder={tmp_path}", phases, "placement.counts=null",
                   "placement.batch_shares=null", "placement.probe_s=0.3", "world.slowdown={0: [4, 12]}")
    run = only_run(tmp_path)
    assert done.stdout.count("expert rows/s") == 2 and "distilled in 5 steps" in done.stdout
    assert sorted(metrics(run)) == list(range(1, 7))
    moedist(1, cache, "train", "--resume", str(run), phases.replace("{train: 3}]", "{train: 5}]"))  # one rank: no slow-downs
    assert sorted(metrics(run)) == list(range(1, 9))


def test_a_sweep_prints_and_writes(run, cache, tmp_path):
    done = moedist(2, cache, "compress", str(run), "--sweep", "0.4,0.7", "--methods",
                   "cur+multiple=1,svd-whitened,prune-random+multiple=1", "--step", "3", "--tokens", "512", "--out",
                   str(tmp_path), "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 6 and figures["compress.svd-whitened.0.7.ppl_ratio"] == pytest.approx(1, abs=0.1)
    assert "svd-whitened" in done.stdout and (tmp_path / "sweep.png").stat().st_size > 10_000
    rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(rows) == 7 and rows[0].startswith("method,ratio,perplexity")


def test_bad_input_is_refused_before_training(cache, tmp_path):
    for value, words in (("{method: curr, ratio: 0.5}", "choose one of cur"), ("{ratio: 1.5}", "below 1"),
                         ("{method: cur}", "needs one of ratio and bytes"), ("{method: cur, ration: 0.5}", "'ratio'"),
                         ("{method: cur, ratio: 0.5, options: {ridges: 1}}", "no option 'ridges'"),
                         ("{method: cur, rank_bytes: {7: 100}}", "the ranks are 0..0")):
        failed = moedist(1, cache, "train", *QUICKSTART, f"folder={tmp_path}", f"phases=[{{train: 1}}, {{compress: {value}}}]",
                         "placement.counts=null", "placement.batch_shares=null", ok=False)
        assert words in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    assert not any(tmp_path.iterdir())


def test_dense_again_computes_the_same_and_trains_on(run, cache, tmp_path):
    perplexity = moedist(1, cache, "evaluate", str(run), "train.batch=256").stdout.split("perplexity")[1]
    told = moedist(2, cache, "compress", str(run), "--dense", f"folder={tmp_path}").stdout
    dense = only_run(tmp_path)
    assert moedist(1, cache, "evaluate", str(dense), "train.batch=256").stdout.split("perplexity")[1] == perplexity
    nothing = moedist(1, cache, "train", "--resume", str(dense)).stdout
    for out in (told, nothing):  # the same command is told, and does something
        program, *arguments = shlex.split(out.split("to train on: ")[1].splitlines()[0])
        assert program.endswith("moedist") and arguments[:3] == ["train", "--resume", str(dense)]
    moedist(1, cache, *arguments)
    assert list(metrics(dense)) == [13]
    assert "compressed" not in (dense / "metrics.jsonl").read_text()


def test_healing_is_compared_with_the_uncompressed_model(run, cache, tmp_path):
    done = moedist(2, cache, "compress", str(run), "--heal", "12", "--methods", "cur,interp", "--ratio", "0.4", "--step", "3",
                   "--tokens", "512", "--json", str(tmp_path / "heal.json"))
    figures = json.loads((tmp_path / "heal.json").read_text())
    assert {f"compress.{m}.0.4.{k}" for m in ("cur", "interp") for k in ("healed_ratio", "moments.10", "fresh.10", "fresh.12")} \
        < figures.keys()
    assert all(0.9 < v < 1.1 for v in figures.values()) and figures["compress.cur.0.4.moments.12"] == \
        figures["compress.cur.0.4.healed_ratio"]
    done = moedist(1, cache, "compress", str(run), "--heal", "11", "--methods", "cur", "--ratio", "0.4", "--step", "3", "--tokens",
                   "512", "--option", "distill_steps=5", "--json", str(tmp_path / "distilled.json"))
    assert {name.rsplit(".", 1)[1] for name in json.loads((tmp_path / "distilled.json").read_text())} \
        == {"10", "11", "healed_ratio"}  # 5 of the 11 steps are distillation
    assert "uncompressed" in done.stdout and not [p for p in run.parent.iterdir() if "heal" in p.name]
