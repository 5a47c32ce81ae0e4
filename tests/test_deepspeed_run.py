"""Runs with DeepSpeed as a user starts them: compressed, moved, resumed by other engines on other ranks, evaluated."""

import dataclasses
import json
import shutil

import pytest

from moedist.config import config_from_dict
from moedist.coordinator import migrate
from moedist.phases.train import evaluate, train_step
from moedist.trainer import build_run
from tests.coordinator.test_migrate import plan_of
from tests.launching import QUICKSTART, metrics, moedist, only_run
from tests.ranks import ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'moedist[deepspeed]')")

PHASES = "phases=[{train: 4}, {compress: {method: cur, ratio: 0.5, tokens: 512}}, {train: 4}]"
STEPS = range(1, 9)
ANY = ["placement.counts=null", "placement.batch_shares=null", "placement.planner=equal"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, cache):
    """The losses with the torch engine."""
    folder = tmp_path_factory.mktemp("torch")
    moedist(1, cache, "train", *QUICKSTART, f"folder={folder}", PHASES, *ANY, "train.eps=1e-5")
    return metrics(only_run(folder))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A DeepSpeed file that splits small parameters too."""
    path = tmp_path_factory.mktemp("json") / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return path


@pytest.fixture(scope="module", params=[1, 3])
def run(request, tmp_path_factory, cache, settings):
    """Two ranks, uneven experts and batches, checkpoints every two steps."""
    folder = tmp_path_factory.mktemp("deepspeed")
    done = moedist(2, cache, "train", *QUICKSTART, f"folder={folder}", PHASES, "engine.name=deepspeed", "train.eps=1e-5",
                   f"engine.zero_stage={request.param}", f"engine.config={settings}", "checkpoint.every=2",
                   "checkpoint.keep=9")
    assert "[WARNING]" not in done.stdout + done.stderr and "FutureWarning" not in done.stderr
    assert "compressed 16 experts by cur" in done.stdout and "51,904 parameters" in done.stdout
    return only_run(folder)


def test_losses_are_those_of_the_torch_engine(run, expected):
    assert list(metrics(run)) == list(STEPS)
    assert metrics(run) == pytest.approx(expected, abs=1e-4)


def test_every_command_opens_it(run, cache):
    assert "perplexity" in moedist(1, cache, "evaluate", str(run), "train.batch=256").stdout
    if "zero_stage: 3" in (run / "config.yaml").read_text():
        assert moedist(2, cache, "generate", str(run), "--prompt", "def ", "--max-tokens", "3").stdout.startswith("def ")


def test_resumed_by_another_engine_on_other_ranks(run, cache, tmp_path):
    """What stage 3 wrote, the torch engine reads, and what stage 1 wrote, stage 3."""
    torch_engine = ["engine.name=torch", "engine.zero_stage=null", "engine.config=null"]
    engine = torch_engine if "zero_stage: 3" in (run / "config.yaml").read_text() else ["engine.zero_stage=3"]
    copy = tmp_path / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("step-0000000[468]"))
    done = moedist(3, cache, "train", "--resume", str(copy), *engine, *ANY)
    assert "resuming after step 2" in done.stdout and "compressed 16 experts" in done.stdout
    assert metrics(copy) == pytest.approx(metrics(run), abs=1e-5)


TREE = {"data": {"tokenizer": "byte", "sequence_length": 16, "max_documents": 40},
        "model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "top_k": 2, "expert_hidden": 12},
        "train": {"batch": 8, "accumulate": 2, "eval_tokens": 64, "eps": 1e-5, "warmup_steps": 2},
        "router": {"bias_rate": 1e-3}, "phases": [{"train": 12}], "monitor": {"wandb": "disabled"}}
PLANS = {3: (((2, 2, 1, 0), (1, 1, 1, 1)), (1.0, 0.0, 3.0)),  # owners in both layers, and shares of the batch
         6: ((((0, 1), (0, 1, 2), 2, 2), (0, (1, 2), 0, 2)), (0.0, 1.0, 1.0)),
         9: (((0, 1, 2, 0), (2, 2, 0, 1)), (1.0, 1.0, 1.0))}


def steps_with_moves(world, folder, cache, engine):
    """Losses of 12 steps; on several ranks experts, copies and batch shares change every three."""
    run = build_run(config_from_dict(TREE, [f"folder={folder}", f"data.cache={cache}", *engine]), world,
                    plan_of(world.size, *[(0, 0, 0, 0) if world.size == 1 else (0, 1, 2, 2)] * 2))
    found = []
    for step in range(12):
        if step in PLANS and world.size > 1:
            owners, shares = PLANS[step]
            run.plan = dataclasses.replace(plan_of(world.size, *owners), batch_shares=shares)
            assert migrate(world, run.engine, run.plan) > 0
        found.append(train_step(run).sums["loss"] / (8 * 16))
        if step % 4 == 3:
            evaluate(run)
    run.recorder.close()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_experts_move_while_it_trains(cache, tmp_path, settings, stage):
    (alone,) = ranks(1).run(steps_with_moves, str(tmp_path), str(cache), [])
    engine = ["engine.name=deepspeed", f"engine.zero_stage={stage}", f"engine.config={settings}"]
    for found in ranks(3).run(steps_with_moves, str(tmp_path), str(cache), engine):
        assert found == pytest.approx(alone, abs=1e-4)
    assert alone[-1] < alone[0] - 0.05


def test_refusals_are_one_line(cache, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"gradient_clipping": 0.5}')
    failed = moedist(1, cache, "train", *QUICKSTART, *ANY, f"folder={tmp_path}/runs", "engine.name=deepspeed",
                     f"engine.config={path}", ok=False)
    assert "sets gradient_clipping to 0.5, which moedist decides; remove it there, and set train.clip" in failed.stderr
    failed = moedist(1, cache, "train", *QUICKSTART, *ANY, f"folder={tmp_path}/runs", "engine.name=deepspeed",
                     "engine.offload=cpu", ok=False)
    assert "rank 0 trains on the CPU" in failed.stderr and "Traceback" not in failed.stderr
