"""Runs whose experts are put in few bits, as a user does it: evaluated and generated from on any number of ranks."""

import json
import math
import re
import shlex
from pydoc_data.topics import topics

import pytest

from tests.launching import QUICKSTART, moedist, only_run

BEAM = ["--method", "beam", "--option", "group=16", "--tokens", "512"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """A run on two ranks: five steps, CUR to widths that no group divides, one step."""
    folder, text = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("text")
    words = "\n".join(topics.values())
    (text / "train.txt").write_text(words[:60_000])
    (text / "valid.txt").write_text(words[60_000:64_000])
    compress = "{compress: {method: cur, ratio: 0.3, tokens: 512, options: {multiple: 1}}}"
    moedist(2, cache, "train", *QUICKSTART, f"folder={folder}", f"phases=[{{train: 5}}, {compress}, {{train: 1}}]",
            "train.dtype=float64", "checkpoint.every=3", "checkpoint.keep=9", "model.init_std=0.1", "data.source=files",
            f"data.path={text}")
    return only_run(folder)


def made(ranks, run, cache, folder, *more):
    """(what was printed, the new run)."""
    done = moedist(ranks, cache, "compress", str(run), *BEAM, *more, f"folder={folder}")
    return done.stdout, only_run(folder)


def loss_of(ranks, run, cache, *overrides) -> float:
    said = moedist(ranks, cache, "evaluate", str(run), "train.batch=256", *overrides).stdout
    return float(re.search(r"loss ([\d.]+)", said)[1])


def test_made_on_two_ranks_read_on_others(run, cache, tmp_path):
    said, low = made(2, run, cache, tmp_path, "--bits", "2", "--budget", "5.5", "--top-n", "1", "train.eval_tokens=null")
    assert "bits a weight" in said and "fewer weights: " in said, "what CUR and few bits store together"
    told = json.loads((low / "lowbit-00000006.json").read_text())
    assert len(told["experts"]) == 16 and told["top_n"] == 1
    for e in told["experts"]:
        assert e["bits"] == 2 and e["restored_error"] <= e["error"] and e["compensator_bytes"] < e["bytes"]
    total, weights = (sum(e[k] for e in told["experts"]) for k in ("bytes", "weights"))
    assert 8 * (total - 4 * weights / 3 / 32) <= 5.5 * weights + 8, "in the budget, names of neurons beside it"
    assert any(e["bytes"] > e["weights"] // 4 for e in told["experts"])
    losses = [loss_of(ranks, low, cache) for ranks in (1, 2, 3)]
    before, after = map(float, re.search(r"validation perplexity ([\d.]+) -> ([\d.]+)", said).groups())
    assert math.log(after) == pytest.approx(losses[0], abs=1e-3)
    assert math.log(before) == pytest.approx(loss_of(1, run, cache), abs=1e-3)
    assert max(losses) - min(losses) < 2e-4, losses
    ends = [loss_of(1, low, cache, f"lowbit.top_n={n}") for n in ("0", "2", "[1,1]")]
    assert ends[0] != losses[0] and ends[1] != losses[0] and ends[2] == losses[0]
    whole = loss_of(1, run, cache)
    assert abs(ends[1] - whole) < abs(ends[0] - whole), "restored experts are nearer to the run they were made of"
    assert moedist(2, cache, "generate", str(low), "--prompt", "def ", "--max-tokens", "3").stdout.startswith("def ")

    for arguments in (["train", "--resume", str(low), "phases=[{train: 9}]"], ["compress", str(low), "--ratio", "0.5"],
                      ["compress", str(low), "--dense"]):
        refused = moedist(1, cache, *arguments, f"folder={tmp_path / 'none'}", ok=False).stderr
        assert "cannot be trained" in refused and str(run) in refused and "Traceback" not in refused, refused
    assert "in few bits already" in moedist(1, cache, "compress", str(low), *BEAM, ok=False).stderr
    assert "cannot be watched" in moedist(1, cache, "inspect", str(low), ok=False).stderr
    again = moedist(1, cache, *shlex.split(said.split("next: ")[1])[1:], "train.batch=256").stdout
    assert f"loss {losses[0]:.4f}" in again, "the command that is told"


def test_many_bits_change_little_and_made_on_one_rank_it_is_the_same(run, cache, tmp_path):
    _, one = made(1, run, cache, tmp_path / "one", "--bits", "8", "--step", "3")
    _, two = made(2, run, cache, tmp_path / "two", "--bits", "8", "--step", "3")
    losses = loss_of(1, one, cache), loss_of(2, two, cache)
    before = moedist(1, cache, "evaluate", str(run), "train.batch=256", "--step", "3").stdout
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0] == pytest.approx(float(re.search(r"loss ([\d.]+)", before)[1]), abs=2e-3)


def test_a_sweep_prints_and_writes(run, cache, tmp_path):
    names = ["bits=2+group=16", "bits=2+group=16+budget=6+top_n=1", "bits=2+group=16+budget=6",
             "bits=2+group=16+budget=6+ranks=kurtosis", "bits=4+group=16+mix=loss"]
    done = moedist(2, cache, "compress", str(run), "--method", "beam", "--sweep", "--methods", ",".join(names),
                   "--tokens", "512", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    plain, first, whole = (figures[f"beam.{name}.moved_bytes"] for name in names[:3])
    assert plain < first < whole, "a token moves compensators of the experts that it restores"
    bits = [figures[f"beam.{name}.bits"] for name in names]
    assert 3 < bits[0] < bits[1] and max(bits[1:4]) < 6.7 and all(name in done.stdout for name in names)


def test_bad_input_is_refused(run, cache):
    for more, words in ((["--bits", "5"], "5 bits cannot be packed: choose 2, 3, 4, 8"),
                        (["--bits", "3", "--budget", "2.9"], "below the 3 bits"),
                        (["--bits", "3", "--budget", "3.1"], "raise it, or take fewer bits"),
                        (["--bits", "3", "--budget", "few"], "bits a weight, such as 3.6"),
                        (["--top-n", "9"], "lowbit.top_n is 9"), (["--top-n", "1,1,1"], "3 numbers for 2 layers"),
                        (["--option", "group=20"], "groups of 20 do not divide 32 inputs: choose a divisor, such as 16"),
                        (["--option", "quant=rtn"], "no option 'quant'")):
        failed = moedist(1, cache, "compress", str(run), *BEAM, *more, ok=False)
        assert words in failed.stderr and "Traceback" not in failed.stderr, failed.stderr


def test_bench_offload_and_experts_outside_the_device(run, cache, tmp_path):
    done = moedist(1, cache, "bench", "offload", str(run), "--methods", "bits=3+group=16,bits=2+group=16+budget=6+top_n=1",
                   "--cache", "0.25", "1", "--tokens", "6", "--rounds", "1", "--watch", "512", "--read", "0.01",
                   "--json", str(tmp_path / "f.json"))
    figures = json.loads((tmp_path / "f.json").read_text())
    assert "bit for bit" in done.stdout and all(value == 1 for name, value in figures.items() if name.endswith("equal"))
    assert figures["offload.bits=3+group=16.1.bytes_ratio"] < 0.3 * 4, "few bits against the float64 of this run"
    for store in ("ram", "disk"):
        said = moedist(2, cache, "evaluate", str(run), "train.batch=256", f"offload.store={store}", "offload.cache_gib=4e-5",
                       "offload.prefetch=1").stdout
        assert "% hits" in said and f"loss {loss_of(2, run, cache):.4f}" in said
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[-2:]):
        assert 0 < line["offload/peak_bytes"] <= 4e-5 * 2**30 and 0 <= line["offload/hit_rate"] < 1
        assert line["offload/bytes"] > line["offload/ahead_bytes"] and line["offload/stall_s"] > 0
    refused = moedist(1, cache, "evaluate", str(run), "offload.store=ram", "offload.cache_gib=1e-6", ok=False).stderr
    assert "does not hold the largest expert" in refused and "Traceback" not in refused
