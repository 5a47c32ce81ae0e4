"""Dense models become mixtures of experts that compute the same where that is promised."""

import json

import pytest
import torch

from moedist.checkpoint import RunFolder
from moedist.errors import ConfigError
from moedist.huggingface import export_run, import_run
from moedist.huggingface.upcycle import Upcycle
from moedist.phases.restore import open_run
from moedist.world import World
from tests.huggingface.models import DENSE, OPTIONS, our_logits, save_model, stored_tensors, their_logits

CLOSE = dict(rtol=0, atol=1e-5)
EQUAL = ["experts=4,top_k=2", "experts=3,top_k=2,granularity=2", "experts=4,top_k=3,granularity=3",
         "experts=2,top_k=1,every=2", "experts=4,top_k=2,granularity=4,shared=1"]


CASES = [*(("llama", recipe) for recipe in EQUAL), ("mistral", EQUAL[1]), ("qwen3", EQUAL[1])]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (a dense model's folder, its logits)."""
    folder = tmp_path_factory.mktemp("dense")
    return {kind: (save_model(folder / kind, kind), their_logits(folder / kind)) for kind in DENSE}


@pytest.fixture
def dense(models):
    return models["llama"]


def upcycled(folder, recipe):
    return import_run(str(folder), name="up", folder=str(folder.parent / "runs"), overrides=OPTIONS, upcycle=recipe)


def weights(run):
    return open_run(run, run.config(), World()).model.named_state()


@pytest.mark.parametrize("kind, recipe", CASES)
def test_the_first_logits_are_those_of_the_dense_model(models, kind, recipe):
    folder, logits = models[kind]
    run = upcycled(folder, recipe)
    torch.testing.assert_close(our_logits(run), logits, **CLOSE)
    named = weights(run)
    routers = [t for name, t in named.items() if name.endswith("router.weight")]
    g = Upcycle.parse(recipe).granularity
    for router in routers:  # one random row a group, shared by its experts
        assert torch.equal(router, router[::g].repeat_interleave(g, dim=0))
        assert len(router[::g].unique(dim=0)) == len(router) // g
        assert 0.1 < router.std() / run.config().model.init_std < 2


def test_tokens_go_to_different_experts_from_the_start(dense):
    folder, _ = dense
    opened = open_run(run := upcycled(folder, "experts=4,top_k=1,granularity=2"), run.config(), World())
    _, layer = next(opened.model.moe_layers())
    x = torch.randn(200, 24)
    chosen = (x @ layer.router.weight.t()).topk(2).indices.sort().values
    assert (chosen[:, 0] // 2 == chosen[:, 1] // 2).all(), "a group is chosen as a whole"
    assert len(chosen.unique(dim=0)) == 4


def test_noise_makes_experts_differ_and_nothing_else(dense):
    folder, logits = dense
    clean = weights(upcycled(folder, "experts=3,top_k=2"))
    noisy = weights(run := upcycled(folder, "experts=3,top_k=2,noise=0.1"))
    for name, tensor in clean.items():
        if name.endswith("router.bias"):
            continue
        added = noisy[name] - tensor
        share = (added.std() / tensor.std()).item()
        assert share == (pytest.approx(0.1, rel=0.25) if ".experts." in name else 0), name
    assert not torch.equal(noisy["layers.0.experts.0.w1"], noisy["layers.0.experts.1.w1"])
    assert torch.equal(clean["layers.0.experts.0.w1"], clean["layers.0.experts.1.w1"])
    distance = (our_logits(run) - logits).abs().max()
    assert 1e-3 < distance < logits.abs().max()


def test_exported_it_is_a_mixture_of_transformers(tmp_path):
    for kind, recipe, architecture in (("mistral", "experts=4,top_k=2,granularity=2", "MixtralForCausalLM"),
                                       ("qwen3", "experts=4,top_k=2,every=2", "Qwen3MoeForCausalLM")):
        folder = save_model(tmp_path / kind, kind, dtype=torch.bfloat16)
        run = upcycled(folder, recipe)
        export_run(str(run), str(tmp_path / f"{kind}-moe"))
        config = json.loads((tmp_path / f"{kind}-moe" / "config.json").read_text())
        assert config["architectures"] == [architecture] and config["max_position_embeddings"] == 48
        # G is a power of two: what is scaled keeps its bits in bfloat16, as the dense model was
        assert {t.dtype for t in stored_tensors(tmp_path / f"{kind}-moe").values()} == {torch.bfloat16}
        rows = weights(run)
        for name, t in stored_tensors(tmp_path / f"{kind}-moe").items():
            if ".experts.1." in name and "layers.1" in name and name.endswith(("w3.weight", "up_proj.weight")):
                assert torch.equal(t.float(), rows["layers.1.experts.1.w3"])
        # the router alone is rounded: experts are chosen anew, but all are copies
        torch.testing.assert_close(their_logits(tmp_path / f"{kind}-moe"), their_logits(folder), rtol=0, atol=2e-5)


@pytest.mark.parametrize("text, words", [
    ("experts=8,topk=2", "'topk=2'; write it as experts=8,top_k=2"), ("experts=many", "'experts=many'"),
    ("experts=2,top_k=3", "top_k at most experts"), ("shared=2", "shared 0 or 1"), ("noise=-1", "noise 0 or more")])
def test_recipes_that_cannot_be(text, words):
    with pytest.raises(ConfigError, match=words):
        Upcycle.parse(text)


def test_scales_are_exact_and_make_up_for_the_weights():
    for g in range(1, 70):
        recipe = Upcycle(granularity=g)
        assert recipe.up_scale * recipe.down_scale == g and recipe.up_scale.is_integer()
        assert 1 <= recipe.down_scale / recipe.up_scale < 4, "about evenly spread"
    assert Upcycle(granularity=4, shared=1).down_scale == 1


def test_a_run_that_is_upcycled_says_so_in_its_configuration(dense):
    folder, _ = dense
    config = RunFolder(upcycled(folder, "experts=3,top_k=2,granularity=2").path).config()
    m = config.model
    assert (m.experts, m.top_k, m.expert_hidden, m.ffn_hidden, m.shared_experts) == (6, 4, 12, 24, 0)
    assert config.router.normalize and config.router.name == "topk" and config.name == "up"
