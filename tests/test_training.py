"""Whole runs: the same losses on any number of ranks, after a kill, after a signal; and what a user is told."""

import os
import signal
import subprocess

import pytest
import torch

from tests.launching import QUICKSTART, TINY, command, metrics, moedist, only_run, output_of, start, wait_for_step

STEPS = 12


def losses(run):
    return list(metrics(run).values())


@pytest.mark.parametrize("router", ["topk", "stochastic_topk", "soft_moe"])
def test_one_rank_and_three_have_the_same_losses_in_float64(tmp_path, cache, router):
    """20 steps, uneven experts and batches, one rank with no experts; and they fall."""
    common = ["train", *QUICKSTART, "phases=[{train: 20}]", "train.dtype=float64", f"router.name={router}",
              "train.accumulate=2", "model.moe_every=2", "checkpoint.every=0",
              "train.eps=1e-5"]  # a small epsilon lets Adam turn rounding noise into whole steps
    moedist(1, cache, *common, f"folder={tmp_path}/one", "placement.counts=[8]", "placement.batch_shares=[1]")
    moedist(3, cache, *common, f"folder={tmp_path}/three", "placement.counts=[6,0,2]", "placement.batch_shares=[4,1,3]")
    one, three = losses(only_run(tmp_path / "one")), losses(only_run(tmp_path / "three"))
    assert len(one) == 20 and one[-1] < one[0] - 0.3
    assert one == pytest.approx(three, abs=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("whole")
    done = moedist(2, cache, "train", *QUICKSTART, f"folder={folder}", f"phases=[{{train: {STEPS}}}]", "checkpoint.every=4",
                   "model.dropout=0.1")
    return only_run(folder), done.stdout


def test_quickstart_says_what_it_did(uninterrupted):
    run, out = uninterrupted
    assert "5 of 8 experts" in out and "3 of 8 experts" in out
    assert "validation loss" in out and "perplexity" in out and str(run) in out
    assert f"moedist generate {run}" in out
    assert (run / "config.yaml").is_file() and (run / "tokenizer.json").is_file()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert list(metrics(run)) == list(range(1, STEPS + 1))


def test_quickstart_as_it_is_measures_and_compresses(tmp_path, cache):
    done = moedist(2, cache, "train", "configs/quickstart.yaml", *TINY, f"folder={tmp_path}", "placement.probe_s=0.3",
                   "phases=[{train: 4}, {compress: {method: cur, ratio: 0.5, tokens: 512}}, {train: 2}]")
    assert done.stdout.count("expert rows/s") == 2 and "compressed 16 experts by cur" in done.stdout
    assert list(metrics(only_run(tmp_path))) == list(range(1, 7))


@pytest.mark.parametrize("step", [2, 9])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, cache, uninterrupted, step):
    """SIGKILL of a rank: all is over in seconds, and after a resume every loss is bit for bit the same."""
    arguments = ["train", *QUICKSTART, f"folder={tmp_path}", f"phases=[{{train: {STEPS}}}]", "checkpoint.every=4",
                 "model.dropout=0.1", "checkpoint.asynchronous=false"]  # it is there when the next step is
    process = start(2, cache, *arguments)
    run = wait_for_step(tmp_path, step, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out = output_of(process, 30)
    assert process.returncode != 0 and "rank" in out
    if step < 4:
        moedist(2, cache, *arguments, "--resume", ok=False)  # no checkpoint yet: it says so
        done = moedist(2, cache, *arguments[:-1], arguments[-1], f"folder={tmp_path}/again")
        run = only_run(tmp_path / "again")
    else:
        done = moedist(2, cache, *arguments, "--resume")
        assert "resuming after step" in done.stdout
    assert metrics(run) == metrics(uninterrupted[0])


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "Ctrl-C"])
def test_a_signal_saves_and_resume_goes_on(tmp_path, cache, uninterrupted, how):
    arguments = ["train", *QUICKSTART, f"folder={tmp_path}", f"phases=[{{train: {STEPS}}}]", "checkpoint.every=0",
                 "model.dropout=0.1"]
    process = start(2, cache, *arguments)
    run = wait_for_step(tmp_path, 3, process)
    if how == "Ctrl-C":  # a terminal sends SIGINT to the whole group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    out = output_of(process, 60)
    assert "stopped by a signal after step" in out and f"--resume {run}" in out
    assert len(list((run / "checkpoints").iterdir())) == 1
    moedist(2, cache, "train", "--resume", str(run))
    assert metrics(run) == metrics(uninterrupted[0])


def test_resume_on_another_number_of_ranks(tmp_path, cache, uninterrupted):
    arguments = ["train", *QUICKSTART, f"folder={tmp_path}", f"phases=[{{train: {STEPS}}}]", "checkpoint.every=8",
                 "train.dtype=float64"]
    moedist(2, cache, *arguments)
    run = only_run(tmp_path)
    whole = metrics(run)
    newest = run / "checkpoints" / "step-00000012"
    subprocess.run(["rm", "-r", str(newest)], check=True)
    done = moedist(3, cache, "train", "--resume", str(run))
    assert "are placed anew" in done.stdout
    assert metrics(run) == pytest.approx(whole, abs=1e-9)


def test_evaluate_and_generate_do_not_depend_on_the_number_of_ranks(cache, uninterrupted):
    run = str(uninterrupted[0])
    perplexity = [moedist(n, cache, "evaluate", run, "train.dtype=float64", "train.batch=256").stdout.strip() for n in (1, 2, 3)]
    assert len(set(perplexity)) == 1 and "perplexity" in perplexity[0]
    arguments = ["generate", run, "--prompt", "def ", "--prompt", "import", "--prompt", "x", "--max-tokens", "12",
                 "train.dtype=float64"]
    texts = [moedist(n, cache, *arguments).stdout for n in (1, 2)]
    assert texts[0] == texts[1] and texts[0].startswith("def ") and "\n---\nimport" in texts[0]


def test_wandb_offline_run_is_written(tmp_path, cache):
    moedist(1, cache, "train", *QUICKSTART, f"folder={tmp_path}", "phases=[{train: 2}]", "placement.counts=null",
            "placement.batch_shares=null", "monitor.wandb=offline")
    assert list(only_run(tmp_path).glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_learns(tmp_path, cache, dtype):
    moedist(2, cache, "train", *QUICKSTART, f"folder={tmp_path}", "phases=[{train: 15}]", f"train.dtype={dtype}",
            "model.recompute=true")
    run_losses = losses(only_run(tmp_path))
    assert run_losses[-1] < run_losses[0] - 0.3


def files_with(tmp_path, text):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text(text)
    return f"data.path={folder}"


BAD = {
    "missing config": (["train", "configs/none.yaml"], ["configs/none.yaml"]),
    "no config": (["train"], ["no configuration given"]),
    "unknown key": (["train", *QUICKSTART, "model.topk=3"], ["model.topk", "model.top_k"]),
    "top_k above experts": (["train", *QUICKSTART, "model.top_k=9"], ["9", "8"]),
    "missing expert": (["train", *QUICKSTART, "placement.counts=null", "placement.batch_shares=null",
                        "placement.owners={0: [0, 1, 2, 3, 4, 5, 6]}"], ["[7]", "without an owner"]),
    "wrong world": (["train", *QUICKSTART], ["placement.counts [5, 3]", "world has 1"]),
    "no such file": (["train", *QUICKSTART, "placement.counts=null", "placement.batch_shares=null", "data.source=files",
                      "data.path=/no/such/folder"], ["/no/such/folder"]),
    "no sequences": (["train", *QUICKSTART, "train.batch=0"], ["train.batch is 0"]),
    "not a run": (["evaluate", "configs"], ["configs is not a run folder"]),
    "not a run to resume": (["train", "--resume", "configs"], ["configs is not a run folder"]),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_line_with_the_way_out(tmp_path, cache, name):
    arguments, words = BAD[name]
    done = moedist(1, cache, *arguments, *([f"folder={tmp_path}"] if len(arguments) > 2 else []), ok=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("data:")]
    assert len(lines) == 1 and lines[0].startswith("moedist: error: "), done.stderr
    for word in words:
        assert word in lines[0]
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


@pytest.mark.parametrize("arguments, words", [
    (["train", "configs/quickstart.yaml", "--debug", "train.batch"], "section.key=value"),
    (["generate", "runs/x", "--prompt", "x", "--temperature", "-1"], "-1 is below 0"),
])
def test_wrong_usage(cache, arguments, words):
    done = moedist(1, cache, *arguments, ok=False)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_check_refuses_before_ranks_start(cache):
    check = ["train", *QUICKSTART, "--check", "--ranks", "2"]
    said = moedist(1, cache, *check).stdout
    assert "fine for 2 rank(s)" in said and "warning" not in said
    many = moedist(1, cache, *check[:-1], "40", "placement.counts=null", "placement.batch_shares=null").stdout
    assert "fine for 40" in many and "40 ranks share 8 experts" in many and "sequences of a forward pass" in many
    typo = moedist(1, cache, *check, "router.options={treshold: 1}", ok=False)
    assert "'treshold', which router topk has not" in typo.stderr and "Traceback" not in typo.stderr
    done = moedist(1, cache, *check, "data.source=files", "data.path=/no/such/folder", ok=False)
    assert "/no/such/folder" in done.stderr and "Traceback" not in done.stderr


def test_wandb_online_without_a_key_is_one_line(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = moedist(1, cache, "train", *QUICKSTART, f"folder={tmp_path}/runs", "phases=[{train: 1}]", "placement.counts=null",
                   "placement.batch_shares=null", "monitor.wandb=online", ok=False)
    assert "monitor.wandb=offline" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_stack_trace(cache):
    assert "Traceback" in moedist(1, cache, "train", "configs/none.yaml", "--debug", ok=False).stderr


@pytest.mark.parametrize("text, words", [("", ["empty"]), ("short", ["tokens", "sequence"])])
def test_too_little_text(tmp_path, cache, text, words):
    done = moedist(1, cache, "train", *QUICKSTART, f"folder={tmp_path}/runs", "placement.counts=null",
                   "placement.batch_shares=null", "data.source=files", files_with(tmp_path, text), ok=False)
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("data:")]
    assert line.startswith("moedist: error: ")


def test_checkpoint_of_another_model_is_refused(cache, uninterrupted):
    run = uninterrupted[0]
    before = (run / "metrics.jsonl").read_text()
    done = moedist(2, cache, "train", "--resume", str(run), "model.width=48", ok=False)
    line = next(line for line in done.stderr.splitlines() if line.startswith("moedist: error"))
    assert "model.width=32" in line and "48" in line
    assert (run / "metrics.jsonl").read_text() == before


def test_divergence_stops_the_run(tmp_path, cache):
    done = moedist(2, cache, "train", *QUICKSTART, f"folder={tmp_path}", "phases=[{train: 30}]", "train.lr=1e30",
                   "train.clip=0", "train.warmup_steps=0", ok=False)
    assert "training has diverged" in done.stderr and "train.lr" in done.stderr


def test_help_is_readable():
    out = subprocess.run(command(1, "train", "--help"), capture_output=True, text=True, check=True).stdout
    assert "torchrun --nproc-per-node 2 -m moedist train" in out and "model.top_k=2" in out
    assert max(map(len, out.splitlines())) < 400


def test_import_is_light():
    """Nor does the first step of an optimizer bring torch's compiler."""
    code = ("import sys, moedist.cli, moedist.trainer; heavy = {'mpi4py', 'deepspeed', 'wandb', 'datasets', 'transformers', "
            "'torch._dynamo'}; import torch; from moedist.config import TrainConfig; from moedist.engine import optimizer\n"
            "for name in ('adamw', 'sgd'):\n"
            "    w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2); config = TrainConfig(optimizer=name)\n"
            "    made = optimizer.build_optimizer(optimizer.dense_groups([w], config), config, w.device)\n"
            "    made.step(); assert w.max() < 1 and w.requires_grad\n"
            "print(sorted(heavy & set(sys.modules)))")
    assert subprocess.run(command(1)[:1] + ["-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_cancelling_does_not_wait_for_torch():
    code = "import sys, moedist.submit.submit, moedist.submit.listing; print('torch' in sys.modules)"
    assert subprocess.run(command(1)[:1] + ["-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.gpu
def test_training_on_an_accelerator_and_mixed_with_a_cpu(tmp_path, cache):
    kind = torch.accelerator.current_accelerator().type
    runs = {}
    for name, device in (("cpu", "cpu"), ("gpu", kind), ("mixed", f"'{kind},cpu'")):
        moedist(2, cache, "train", *QUICKSTART, f"folder={tmp_path}/{name}", "phases=[{train: 10}]", f"world.device={device}")
        runs[name] = losses(only_run(tmp_path / name))
    assert runs["gpu"] == pytest.approx(runs["cpu"], rel=2e-3)
    assert runs["mixed"] == pytest.approx(runs["cpu"], rel=2e-3)
