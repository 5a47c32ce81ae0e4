"""`moedist inspect` on real runs, and the tokens it finds against a forward pass watched from outside."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from moedist.checkpoint import RunFolder, load_checkpoint
from moedist.config import config_from_dict
from moedist.coordinator.migrate import migrate
from moedist.data import EvalStream
from moedist.dispatch import build_transport
from moedist.engine import TorchEngine
from moedist.inspect_run import _watch_tokens
from moedist.model import Transformer
from moedist.neurons.record import read_records
from moedist.phases.calibrate import Source, dense_expert
from moedist.placement import plan_from_config
from moedist.world import World
from tests.coordinator.test_migrate import plan_of
from tests.launching import QUICKSTART, moedist, only_run
from tests.ranks import run_ranks

COUNTS = {1: [4], 2: [3, 1], 4: [2, 0, 1, 1]}
COPIES = {2: plan_of(2, ((0, 1), 1, (0, 1), 0), (1, (0, 1), 0, 1)),
          4: plan_of(4, ((0, 2), 3, (1, 2, 3), 0), (3, 3, (0, 1), 1))}
CHOSEN = torch.tensor([5, 0])
REAL = 33  # tokens: five sequences of six and half a one


class _Bar:
    def update(self, _: int) -> None:
        pass


def model_and_source(world, router):
    config = config_from_dict({"model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_hidden": 8,
                                         "init_std": 0.4},
                               "data": {"sequence_length": 6}, "router": {"name": router},
                               "placement": {"counts": COUNTS[world.size]}})
    model = Transformer(config, 20, plan_from_config(config, world.size), build_transport(world), torch.device("cpu"),
                        torch.float64)
    if world.size > 1:
        migrate(world, TorchEngine(model, config.train, world), COPIES[world.size])
    stream = EvalStream(np.random.default_rng(0).integers(0, 20, REAL + 1), 6)
    return model.eval(), Source(stream, 0, stream.sequences, 4, torch.float64)


def watched(world, router):
    """(layer, expert, neuron) -> its (key, activation)s, of the experts of this rank."""
    model, source = model_and_source(world, router)
    chosen = {(i, e): CHOSEN for i, moe in model.moe_layers() for e in moe.dispatcher.layout.primary_experts}
    top = _watch_tokens(model, world, source, chosen, _Bar())
    assert all(moe.watch is None for _, moe in model.moe_layers())
    return {(*key, j): found.of(i) for key, found in top.items() for i, j in enumerate(CHOSEN.tolist())}


def seen_from_outside(router):
    """The same on one rank, from what routers are given and answer."""
    model, source = model_and_source(World(), router)
    found: dict = {}
    for i, moe in model.moe_layers():
        def hook(_, inputs, routed, i=i, moe=moe):
            x, keys = inputs[0].x_GSD, inputs[0].keys_GS
            if routed.mix_in is not None:
                keys, x = keys.gather(1, routed.mix_in.argmax(2)), routed.mix_in.to(x.dtype) @ x
            for t, e in zip(routed.token_ids_N.tolist(), routed.expert_ids_N.tolist()):
                h = dense_expert(moe, e).neurons(x.flatten(0, 1)[t:t + 1])[0]
                for j in CHOSEN.tolist():
                    if (key := int(keys.flatten()[t])) < REAL:
                        found.setdefault((i, e, j), []).append((key, float(h[j])))
        moe.router.register_forward_hook(hook)
    with torch.no_grad():
        for batch, _ in source.batches(model, World()):
            model(batch)
    return {neuron: sorted(pairs, key=lambda p: (-abs(p[1]), p[0]))[:24] for neuron, pairs in found.items()}


@pytest.mark.parametrize("router", ["topk", "soft_moe"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_that_neurons_fire_on_are_theirs_wherever_experts_are(ranks, router):
    expected, found = seen_from_outside(router), {}
    for part in run_ranks(ranks, watched, router):
        assert not found.keys() & part.keys()
        found.update(part)
    assert sum(map(len, expected.values())) > 100
    for neuron, pairs in expected.items():
        assert [key for key, _ in found[neuron]] == [key for key, _ in pairs]
        assert [h for _, h in found[neuron]] == pytest.approx([h for _, h in pairs], rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    """Trained and compressed twice on two ranks, and trained on."""
    folder = tmp_path_factory.mktemp("run")
    moedist(2, cache, "train", *QUICKSTART, f"folder={folder}", "checkpoint.keep=5",
            "phases=[{train: 6},{compress: {method: cur, ratio: 0.3, tokens: 1000}},{train: 3},"
            "{compress: {method: cur-hybrid, ratio: 0.5, tokens: 1000, options: {multiple: 4}}},{train: 4}]")
    return only_run(folder)


@pytest.fixture(scope="module")
def inspected(run, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    done = moedist(1, cache, "inspect", str(run), "--tokens", "2000", "--top", "2", "--json", f"{folder}/all.json",
                   "--pictures", f"{folder}/pictures")
    return done.stdout, json.loads((folder / "all.json").read_text()), folder / "pictures"


def kept_in(run, step) -> dict[tuple[int, int], list[int]]:
    """The index vectors `neurons` of a checkpoint, which holds all experts compressed."""
    records, folder = read_records(RunFolder(run).neurons_file(9)), RunFolder(run)
    vectors = {f"layers.{i}.experts.{e}.neurons": torch.zeros(len(r.kept), dtype=torch.int32)
               for (i, e), r in records.items() if len(r.kept) < 24}
    load_checkpoint(folder.checkpoint(step), vectors, World())
    return {(int(name.split(".")[1]), int(name.split(".")[3])): v.tolist() for name, v in vectors.items()}


def test_neurons_are_those_of_the_checkpoint(run, inspected):
    """Through two compressions, in the checkpoint taken right after and in the one after more training."""
    _, found, _ = inspected
    assert found["step"] == 13 and [c["method"] for c in found["compressions"]] == ["cur", "cur-hybrid"]
    kept = kept_in(run, 13)
    assert kept and kept == kept_in(run, 9)
    first, second = (read_records(RunFolder(run).neurons_file(step)) for step in (6, 9))
    for e in found["experts"]:
        key = e["layer"], e["expert"]
        ids = sorted(n["neuron"] for n in e["neurons"])
        assert ids == kept.get(key, list(range(24))) == second[key].kept.tolist()
        assert second[key].neurons.tolist() == first[key].kept.tolist()
        assert sorted([*ids, *(d["neuron"] for d in e["dropped"])]) == list(range(24))
        shares = first[key].fisher_kept, second[key].fisher_kept
        assert e["fisher_kept"] == (None if None in shares else pytest.approx(shares[0] * shares[1]))  # None: no tokens came
        for d in e["dropped"]:
            there = {6: first, 9: second}[d["step"]][key].kept
            assert {s["neuron"] for s in d["stand_ins"]} <= set(there)
    assert sum(len(e["dropped"]) for e in found["experts"]) > 100


def test_shares_add_up(inspected):
    _, found, _ = inspected
    assert found["tokens"] == 1984 and len(found["experts"]) == 16
    for layer in (0, 1):
        of_layer = [e for e in found["experts"] if e["layer"] == layer]
        assert sum(e["frequency"] for e in of_layer) == pytest.approx(2)  # top 2
        assert sum(e["frequency"] * e["router_weight"] for e in of_layer if e["frequency"]) == pytest.approx(1, rel=1e-4)
    for e in found["experts"]:
        shares = [n["fisher_share"] for n in e["neurons"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1 if e["fisher"] else 0, rel=1e-4)
        assert ["tokens" in n for n in e["neurons"]] == [True] * 2 + [False] * (len(shares) - 2)


def test_tables_and_pictures(inspected):
    out, found, pictures = inspected
    heaviest = max((e for e in found["experts"] if e["layer"] == 1), key=lambda e: e["fisher"])
    assert f"layer 1, expert {heaviest['expert']}: {heaviest['hidden']} of 24 neurons" in out
    assert out.count("activation  on token") == 2  # one expert a layer
    assert "by chance" in out and "cur-hybrid at step 9" in out and "rank " in out
    assert sorted(p.name for p in pictures.iterdir()) == [
        "fisher.png", "overlap-read-dimensions.png", "overlap-read-space.png", "overlap-tokens.png",
        "overlap-write-dimensions.png", "overlap-write-space.png", "routing.png", "widths.png"]
    for path in pictures.iterdir():
        image = imread(path)
        assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.01, path


def test_two_ranks_see_the_same(run, inspected, cache, tmp_path):
    """Chosen experts alone, on two ranks."""
    out = moedist(2, cache, "inspect", str(run), "--tokens", "2000", "--top", "2", "--layer", "1", "--expert", "2", "5",
                  "--json", f"{tmp_path}/some.json").stdout
    assert out.count("activation  on token") == 2 and "layer 1, expert 2:" in out and "layer 1, expert 5:" in out
    some = json.loads((tmp_path / "some.json").read_text())
    all_of = {e["expert"]: e for e in inspected[1]["experts"] if e["layer"] == 1}
    assert [e["expert"] for e in some["experts"]] == list(range(8))
    for e in some["experts"]:
        whole = all_of[e["expert"]]
        assert ("neurons" in e) == (e["expert"] in (2, 5))
        assert e["fisher"] == pytest.approx(whole["fisher"], rel=1e-3)
        assert e["frequency"] == pytest.approx(whole["frequency"], abs=2e-3)
        if "neurons" in e:
            assert [n["neuron"] for n in e["neurons"][:2]] == [n["neuron"] for n in whole["neurons"][:2]]
            assert e["dropped"] == whole["dropped"]


def test_a_checkpoint_before_any_compression(run, cache, tmp_path):
    """The record of a compression that came later is not taken for its own; nor is the file of a run that went another way."""
    other = tmp_path / "run"
    folder = RunFolder(run)
    moedist(2, cache, "train", *QUICKSTART, f"folder={other}", "phases=[{train: 9}]")
    plain = RunFolder(only_run(other))
    for step in (6, 9):
        plain.neurons_file(step).write_bytes(folder.neurons_file(step).read_bytes())
        plain.compression_file(step).write_bytes(folder.compression_file(step).read_bytes())
    moedist(1, cache, "inspect", str(plain), "--tokens", "500", "--json", f"{tmp_path}/plain.json")
    found = json.loads((tmp_path / "plain.json").read_text())
    records = read_records(folder.neurons_file(6))
    for e in found["experts"]:
        whole = len(records[e["layer"], e["expert"]].kept) == 24
        assert e["hidden"] == 24 and e["dropped"] == [] and (whole or e["compressions"] == [])


@pytest.mark.parametrize("wrong, words", [(["--layer", "7"], "no layer with experts 7; this model has 0, 1"),
                                          (["--expert", "8"], "no expert 8"), (["--step", "4"], "no checkpoint of step 4")])
def test_what_is_not_there(run, cache, wrong, words):
    done = moedist(1, cache, "inspect", str(run), *wrong, ok=False)
    assert words in done.stderr and "Traceback" not in done.stderr


def test_matplotlib_is_imported_for_pictures_alone():
    code = "import sys, moedist.cli, moedist.inspect_run, moedist.phases; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
