"""The transformer: causality, seeds, recomputation, dtypes, dense blocks."""

import pytest
import torch

from moedist.config import config_from_dict
from moedist.dispatch import LocalTransport, build_transport
from moedist.errors import ConfigError
from moedist.model import Batch, Transformer
from moedist.placement import plan_from_config
from moedist.routing import ROUTERS
from moedist.world import World
from tests.ranks import run_ranks

TINY = {"model": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "experts": 4, "expert_hidden": 8, "ffn_hidden": 20},
        "data": {"sequence_length": 12}}
VOCAB = 30


def build(*overrides: str, world: World | None = None, dtype: torch.dtype = torch.float64) -> Transformer:
    config = config_from_dict(TINY, overrides)
    world = world or World()
    return Transformer(config, VOCAB, plan_from_config(config, world.size), build_transport(world), torch.device("cpu"), dtype)


def batch(length: int = 12, sequences: int = 2) -> Batch:
    ids = torch.randint(0, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(3))
    return Batch(ids, torch.arange(ids.numel()).view_as(ids), 5)


@pytest.mark.parametrize("router, causal", [(name, name not in ("expert_choice", "soft_moe")) for name in sorted(ROUTERS)])
def test_causality_is_what_the_router_says(router, causal):
    model = build(f"router.name={router}").eval()
    with torch.no_grad():
        for p in [*model.parameters(), *(p for bank in model.banks.values() for p in bank.parameters())]:
            p.mul_(20 if p.dim() > 1 else 1)  # initial weights are too small for later tokens to show
    assert model.causal == causal
    full = batch()
    changed = full.ids_GS.clone()
    changed[:, -3:] = (changed[:, -3:] + 1) % VOCAB
    a, b = model(full)[0], model(Batch(changed, full.keys_GS, full.seed))[0]
    assert torch.allclose(a[:, :-3], b[:, :-3], atol=1e-12) == causal
    assert not torch.allclose(a[:, -3:], b[:, -3:])


def named_weights(world, counts):
    model = build(f"placement.counts={counts}", world=world)
    return {n: t.clone() for n, t in model.named_state().items()}


def test_initial_weights_do_not_depend_on_placement():
    alone = run_ranks(1, named_weights, [4])[0]
    parts = run_ranks(3, named_weights, [3, 0, 1])
    union = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(tensor, alone[name]), name
            union[name] = tensor
    assert union.keys() == alone.keys() and "layers.1.experts.3.w2" in union
    assert len({tuple(t.flatten()[:3].tolist()) for n, t in alone.items() if "experts" in n}) == 24  # all different


def gradients(model: Transformer) -> dict:
    hidden, reports = model(batch())
    (hidden.square().sum() + sum(r.aux_losses["balance_loss"] for r in reports.values())).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for bank in model.banks.values():
        grads |= bank.split_by_name(tuple(p.grad for p in bank.parameters()))
    return grads | {f"load {i}": r.load_WE for i, r in reports.items()}


def recomputed_gradients(world, recompute):
    return gradients(build(f"model.recompute={recompute}", "model.dropout=0.0", "router.name=stochastic_topk", world=world))


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_changes_nothing_and_counts_nothing_twice(ranks):
    for plain, recomputed in zip(run_ranks(ranks, recomputed_gradients, False), run_ranks(ranks, recomputed_gradients, True)):
        assert plain.keys() == recomputed.keys()
        for name in plain:
            torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-12, atol=1e-12)


def test_experts_stay_out_of_the_module_tree():
    model = build("model.shared_experts=1", "router.name=shared_expert")
    assert not any("experts" in name for name, _ in model.named_parameters())
    assert set(model.banks) == {0, 1} and sum(1 for _ in model.moe_layers()) == 2


def test_dense_blocks_and_untied_head():
    model = build("model.moe_every=2", "model.tie_embeddings=false", "model.activation=gelu")
    assert set(model.banks) == {1} and model.head_weight is not model.embedding.weight
    dense = build("model.moe_every=0")
    assert not dense.banks and dense(batch())[0].shape == (2, 12, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype):
    model = build(dtype=torch.float32).eval()
    exact = model(batch())[0]
    with torch.autocast("cpu", dtype=dtype):
        low = model(batch())[0]
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_rank_without_sequences_has_a_graph():
    model = build()
    hidden, _ = model(Batch(torch.zeros(0, 12, dtype=torch.int64), torch.zeros(0, 12, dtype=torch.int64), 0))
    hidden.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert isinstance(model.layers[0].ffn.dispatcher.transport, LocalTransport)


def loud(model: Transformer) -> Transformer:
    """Attention that matters: initial weights are so small that nothing before the softmax shows."""
    with torch.no_grad():
        for block in model.layers:
            block.attention.wqkv.weight *= 30
            block.attention.wo.weight *= 30
    return model.eval()


@pytest.mark.parametrize("kind", ["none", "head", "all"])
def test_normalised_queries_forget_their_scale(kind):
    model = loud(build(f"model.qk_norm={kind}", "model.norm_eps=1e-12"))
    before = model(batch())[0]
    with torch.no_grad():
        model.layers[0].attention.wqkv.weight[:16] *= 7  # all queries
    assert torch.allclose(model(batch())[0], before, rtol=1e-9, atol=1e-12) == (kind != "none")
    with torch.no_grad():
        model.layers[0].attention.wqkv.weight[:8] *= 5  # queries of one head of two
    again = model(batch())[0]
    assert torch.allclose(again, before, rtol=1e-9, atol=1e-12) == (kind == "head")


def test_norm_weights_of_queries_and_keys_have_the_width_they_norm_over():
    heads = [[len(p) for n, p in build(f"model.qk_norm={kind}", "model.head_width=6").named_parameters()
              if n.startswith("layers.0") and n.endswith(("q_norm.weight", "k_norm.weight"))] for kind in ("none", "head", "all")]
    assert heads == [[], [6, 6], [12, 6]]


def test_clipping_bounds_queries_keys_and_values():
    free, wide = loud(build()), loud(build("model.clip_qkv=1000.0"))
    assert torch.equal(free(batch())[0], wide(batch())[0])
    narrow = loud(build("model.clip_qkv=0.01"))
    seen = []
    narrow.layers[0].attention.wo.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item()))
    narrow(batch())
    assert seen[0] <= 0.01 + 1e-12 and not torch.equal(free(batch())[0], narrow(batch())[0])


def odd_gradients(world, sequences):
    """Gradients of dense weights, summed over ranks, of a model with every attention key in use."""
    model = loud(build("model.qk_norm=all", "model.head_width=6", "model.clip_qkv=0.5", "model.dense_blocks=[0]", world=world))
    model.train()
    first = sum(sequences[:world.rank])
    full = batch(sequences=sum(sequences))
    mine = slice(first, first + sequences[world.rank])
    hidden, _ = model(Batch(full.ids_GS[mine], full.keys_GS[mine], full.seed))
    hidden.square().sum().backward()
    return {n: world.all_reduce_(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in model.named_parameters()}


def test_attention_keys_work_on_ranks_without_sequences():
    alone, parts = run_ranks(1, odd_gradients, [3])[0], run_ranks(2, odd_gradients, [0, 3])
    assert "layers.0.ffn.w_in.weight" in alone and "layers.1.ffn.router.weight" in alone
    for part in parts:
        for name, grad in alone.items():
            torch.testing.assert_close(part[name], grad, rtol=1e-9, atol=1e-12)
            assert name.endswith("embedding.weight") or grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["head", "all"])
def test_norms_of_queries_survive_autocast(kind):
    model = loud(build(f"model.qk_norm={kind}", dtype=torch.float32))
    exact = model(batch())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch())[0]
    torch.testing.assert_close(low.float(), exact, rtol=0.1, atol=0.1)


def test_rows_of_the_embedding_beyond_the_tokens():
    model = build("model.vocab=40", "model.tie_embeddings=false")
    assert model.embedding.weight.shape == model.head_weight.shape == (40, 16)
    with pytest.raises(ConfigError, match=r"model.vocab \(29\) has no room for the 30 tokens"):
        build("model.vocab=29")
