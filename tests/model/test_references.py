"""The layer and the whole model against Hugging Face Mixtral with the same weights, in float64."""

from unittest import mock

import pytest
import torch

from moedist.bench.peers import copy_to_hugging_face
from moedist.config import RouterConfig, config_from_dict
from moedist.dispatch import LocalTransport
from moedist.model import Batch, Transformer, next_token_loss_sum
from moedist.placement import plan_from_config
from moedist.routing import RouterInput
from moedist.world import World
from tests.moe_cases import Case, build_layer

transformers = pytest.importorskip("transformers")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def everything_in_float64():
    """Mixtral casts its router's softmax and rotary tables to float32; for a comparison in float64 the cast must not."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("top_k, experts", [(1, 4), (2, 4), (8, 9)])
def test_layer_equals_mixtral_block_forward_and_backward(top_k, experts):
    layer, bank = build_layer(World(), Case((0,) * experts, (3,), top_k=top_k))
    block = copy_to_hugging_face(layer)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ids = torch.zeros(3, 6, dtype=torch.int64)
    y, _ = layer(RouterInput(a, ids, ids, 0, True))
    with everything_in_float64():
        expected = block(b)
    torch.testing.assert_close(y, expected, **EXACT)
    probe = torch.randn_like(x)
    (y * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **EXACT)
    torch.testing.assert_close(layer.router.weight.grad, block.gate.weight.grad, **EXACT)
    torch.testing.assert_close(bank.w_in.grad.view_as(block.experts.gate_up_proj), block.experts.gate_up_proj.grad, **EXACT)
    torch.testing.assert_close(bank.w_out.grad.view(experts, -1, 8).mT, block.experts.down_proj.grad, **EXACT)


def mixtral_of(model: Transformer, config, vocab: int):
    """A `MixtralForCausalLM` with the weights of ours."""
    m = config.model
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=vocab, hidden_size=m.width, intermediate_size=m.expert_hidden, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, num_local_experts=m.experts,
        num_experts_per_tok=m.top_k, rms_norm_eps=m.norm_eps, rope_theta=m.rope_base, sliding_window=None,
        tie_word_embeddings=False, attn_implementation="sdpa", experts_implementation="eager")).double().eval()
    state, head = {}, m.width // m.heads
    for i, block in enumerate(model.layers):
        p = f"model.layers.{i}."
        sizes = [m.heads * head, m.kv_heads * head, m.kv_heads * head]
        for name, w in zip("qkv", block.attention.wqkv.weight.split(sizes)):
            state[f"{p}self_attn.{name}_proj.weight"] = w
        state[p + "self_attn.o_proj.weight"] = block.attention.wo.weight
        state[p + "input_layernorm.weight"] = block.attention_norm.weight
        state[p + "post_attention_layernorm.weight"] = block.ffn_norm.weight
        mlp = copy_to_hugging_face(block.ffn)
        state |= {p + "mlp." + n: t for n, t in mlp.state_dict().items()}
    state |= {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight,
              "lm_head.weight": model.head_weight}
    theirs.load_state_dict(state)
    return theirs


def test_model_equals_mixtral():
    vocab = 40
    config = config_from_dict({"model": {"layers": 3, "width": 24, "heads": 6, "kv_heads": 2, "experts": 5,
                                         "expert_hidden": 7, "tie_embeddings": False}, "train": {"dtype": "float64"}})
    model = Transformer(config, vocab, plan_from_config(config, 1), LocalTransport(), torch.device("cpu"), torch.float64)
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)  # norms and small weights away from their initial values
    theirs = mixtral_of(model, config, vocab)
    ids = torch.randint(0, vocab, (2, 11))
    hidden, _ = model(Batch(ids, torch.zeros_like(ids), 0))
    expected = theirs(ids).logits
    # Mixtral computes rotary tables and router softmax in float32
    torch.testing.assert_close(hidden @ model.head_weight.t(), expected, rtol=1e-5, atol=1e-5)
    loss = next_token_loss_sum(hidden[:, :-1].flatten(0, 1), model.head_weight, ids[:, 1:].flatten())
    assert loss.item() / ids[:, 1:].numel() == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-5)


def test_router_config_default_is_mixtral():
    assert RouterConfig().name == "topk" and RouterConfig().normalize
