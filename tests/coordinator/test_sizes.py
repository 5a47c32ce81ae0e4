"""What planning thinks a model weighs is what it weighs."""

import pytest
import torch

from moedist.config import config_from_dict
from moedist.coordinator.sizes import STATES, Sizes
from moedist.dispatch import LocalTransport
from moedist.model import Transformer
from moedist.placement import plan_from_config

TREE = {"data": {"sequence_length": 16}, "train": {"batch": 12, "accumulate": 3},
        "model": {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "experts": 6, "top_k": 2, "expert_hidden": 24,
                  "ffn_hidden": 40}}
VOCAB = 101


@pytest.mark.parametrize("overrides", [
    [],
    ["model.activation=gelu", "model.tie_embeddings=false"],
    ["model.moe_every=2", "model.shared_experts=2", "model.kv_heads=4"],
    ["model.moe_every=0"],
    ["train.dtype=float64", "router.name=shared_expert", "model.shared_experts=1"],
    ["train.dtype=bfloat16", "router.name=stochastic_topk"],
    ["model.head_width=12", "model.qk_norm=head", "model.dense_blocks=[0]", "model.vocab=128"],
    ["model.qk_norm=all", "model.dense_blocks=[1,2]", "model.vocab=128", "model.tie_embeddings=false"],
    ["router.name=soft_moe"], ["router.name=hash"], ["router.name=expert_choice"], ["router.name=comet"],
    ["router.name=null_experts", "router.options={null_experts: 3}"],
])
def test_weights_equal_those_of_the_real_model(overrides):
    config = config_from_dict(TREE, overrides)
    sizes = Sizes.of(config, VOCAB)
    weights = torch.float64 if config.train.dtype == "float64" else torch.float32
    model = Transformer(config, VOCAB, plan_from_config(config, 1), LocalTransport(), torch.device("cpu"), weights)
    assert sizes.dense_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for bank in model.banks.values():
        held = sum(p.numel() * p.element_size() for p in bank.parameters())
        assert held == sizes.experts * sizes.expert_bytes
    assert sizes.moe_layers == tuple(model.banks)


def test_the_work_of_a_step():
    sizes = Sizes.of(config_from_dict(TREE), VOCAB)
    assert (sizes.part, sizes.calls, sizes.tokens, sizes.rows) == (4, 3, 12 * 16, 12 * 16 * 2)
    assert sizes.row_bytes == 4 * 32 and Sizes.of(config_from_dict(TREE, ["train.dtype=bfloat16"]), VOCAB).row_bytes == 2 * 32


@pytest.mark.parametrize("overrides, rows, most", [
    (["router.name=dynmole"], 6, 6), (["router.name=progressive"], 2, 6), (["router.name=null_experts"], 2, 4),
    (["router.name=top_p"], 2, 3.4), (["router.name=comet"], 2, 6), (["router.name=expert_choice"], 2.25, 2.25),
    (["router.name=soft_moe", "router.capacity_factor=0.5"], 1.125, 1.125),  # ceil(0.5 * 16 * 2 / 6) slots an expert
    (["router.name=topk"], 2, 2)])
def test_the_router_says_how_many_rows_a_token_has(overrides, rows, most):
    """On average for the work of a step, at most for memory."""
    sizes, plain = (Sizes.of(config_from_dict(TREE, more), VOCAB) for more in (overrides, []))
    assert sizes.rows == sizes.tokens * rows
    row_bytes = 4 * (2 * 32 + 2 * 24) * (4 + 1)  # of every block, and of one at work
    assert sizes.token_bytes - plain.token_bytes == pytest.approx((most - 2) * row_bytes, abs=5)


def test_recomputation_keeps_less():
    whole, less = (Sizes.of(config_from_dict(TREE, [f"model.recompute={on}"]), VOCAB) for on in ("false", "true"))
    assert less.token_bytes < whole.token_bytes / 2


def test_what_fits_fits():
    sizes = Sizes.of(config_from_dict(TREE), VOCAB)
    for free in (10**6, 2 * 10**6, 10**7):
        slots = sizes.expert_slots(free)
        used = STATES * (sizes.dense_bytes + slots * 4 * sizes.expert_bytes) + sizes.sequence * sizes.token_bytes
        assert used <= free < used + STATES * 4 * sizes.expert_bytes
        sequences = sizes.sequence_slots(free, 4 * slots)
        used = STATES * (sizes.dense_bytes + 4 * slots * sizes.expert_bytes) + sequences * sizes.sequence * sizes.token_bytes
        assert 1 <= sequences and used <= free < used + sizes.sequence * sizes.token_bytes
    assert sizes.expert_slots(1000) == 0 == sizes.sequence_slots(1000, 0)
