"""`moedist generate` as it is called: prompts from files, several samples, streaming, JSON, routers without a cache."""

import json

import pytest

from moedist.errors import DataError
from moedist.generate import read_prompts
from tests.launching import QUICKSTART, moedist, only_run

EXACT = "train.dtype=float64"


STOPS = "acegikmoqsuwy"  # a model that has hardly learned draws any byte: one of so many comes soon


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("run")
    moedist(2, cache, "train", *QUICKSTART, f"folder={folder}", "phases=[{train: 3}]", "router.name=switch", "model.top_k=1",
            "train.eval_tokens=64")
    return str(only_run(folder))


def test_everything_a_user_may_ask_for(run, cache, tmp_path):
    """A router with a capacity, then the same without one: on one rank and on two, with a cache and without."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "import"}\n\n"class"\n')
    arguments = ["generate", run, EXACT, "router.capacity_factor=0", "--prompt", "def ", "--prompts", str(prompts), "-n", "2",
                 "--max-tokens", "40", "--top-k", "0", "--top-p", "0.95", "--min-p", "0.001", "--repetition-penalty", "1.1",
                 "--seed", "5", *(word for letter in STOPS for word in ("--stop", letter))]
    one = moedist(1, cache, *arguments, "--json", f"{tmp_path}/one.json")
    two = moedist(2, cache, *arguments, "--batch", "2", "--json", f"{tmp_path}/two.json")
    whole = moedist(1, cache, *arguments, "--no-cache")
    assert one.stdout == two.stdout == whole.stdout and one.stdout.count("\n---\n") == 5
    assert "outgrow data.sequence_length=32: each then forgets all but its last 16 tokens" in one.stderr
    assert "tokens/s" in one.stderr and "with a cache" in two.stderr and "without a cache" in whole.stderr
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert told[0]["samples"] == told[1]["samples"] and [t["ranks"] for t in told] == [1, 2]
    assert [(s["prompt"], s["sample"]) for s in told[0]["samples"]] == [(p, n) for p in ("def ", "import", "class")
                                                                        for n in (0, 1)]
    for sample in told[0]["samples"]:
        assert sample["prompt"] + sample["text"] in one.stdout and not set(STOPS) & set(sample["text"])
        assert (sample["ended"] == "stop") == (chr(sample["ids"][-1]) in STOPS) and len(sample["ids"]) <= 40
    assert {s["ended"] for s in told[0]["samples"]} >= {"stop"} and told[0]["timings"]["decode_tokens"] > 0


def test_a_capacity_goes_without_a_cache_and_says_so(run, cache):
    arguments = ["generate", run, EXACT, "--prompt", "def ", "--max-tokens", "6", "--temperature", "0"]
    done = moedist(2, cache, *arguments, "--stream")
    assert done.stderr.count("router switch gives experts a capacity: each token is computed from its whole sequence") == 1
    assert done.stdout == moedist(1, cache, *arguments).stdout and done.stdout.startswith("def ")
    assert "go without one" in moedist(1, cache, *arguments, "--cache", ok=False).stderr


@pytest.mark.parametrize("wrong, words", [
    ([], "no prompt given"), (["--prompt", "a", "-n", "2", "--stream"], "one text as it comes, but 2 are asked for"),
    (["--prompt", "a", "--top-p", "1.5"], "top_p is 1.5; it must be above 0, up to 1"),
    (["--prompts", "no-such.txt"], "the prompts in no-such.txt cannot be read")])
def test_what_cannot_be(run, cache, wrong, words):
    done = moedist(1, cache, "generate", run, *wrong, ok=False)
    assert words in done.stderr and "Traceback" not in done.stderr


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text('def f\n\n"x"\n')
    assert read_prompts(str(tmp_path / "a.txt")) == ["def f", '"x"']
    for text, words in (("[1]\n", "line 1: no prompt"), ('"a"\n{"p": 1}', "line 2: no prompt"), ("a", "line 1: no JSON"),
                        ("\n", "has no prompts")):
        (tmp_path / "b.jsonl").write_text(text)
        with pytest.raises(DataError, match=words):
            read_prompts(str(tmp_path / "b.jsonl"))
