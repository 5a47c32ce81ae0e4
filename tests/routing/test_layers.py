"""Routers that hand something on from layer to layer: several layers give the result of one process, recomputed or not."""

import pytest
import torch

from moedist.config import config_from_dict
from moedist.dispatch import build_transport
from moedist.model import Batch, Transformer, next_token_loss_sum
from moedist.placement import LayerPlan, Plan
from tests.ranks import run_ranks
from tests.routing.settings import options_of

SEQUENCES, VOCAB, LENGTH = (2, 0, 3), 21, 6
OWNERS = (0, 0, 1, 2, 2, 2)


def gradients(world, name: str, recompute: bool, more: dict | None = None) -> dict[str, torch.Tensor]:
    """Gradients of all weights of a three-layer model on these ranks, by name, and the loss."""
    given = options_of(name)
    config = config_from_dict({
        "model": {"layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "experts": 6, "top_k": 2, "expert_hidden": 8,
                  "recompute": recompute, "init_std": 0.3, **given.get("model", {})},
        "data": {"sequence_length": LENGTH}, "router": {"name": name, **given.get("router", {}), **(more or {})}})
    layer = LayerPlan.single([o % world.size for o in OWNERS])
    plan = Plan(world.size, tuple((i, layer) for i in range(3)), (1.0,) * world.size)
    model = Transformer(config, VOCAB, plan, build_transport(world), world.device, torch.float64, world.meter).train()
    sequences = SEQUENCES if world.size > 1 else (sum(SEQUENCES),)
    first = sum(sequences[:world.rank])
    mine = slice(first, first + sequences[world.rank])
    ids = torch.randint(0, VOCAB, (sum(SEQUENCES), LENGTH + 1), generator=torch.Generator().manual_seed(3))
    keys = torch.arange(ids.shape[0] * LENGTH).view(-1, LENGTH)
    hidden, reports = model(Batch(ids[mine, :-1], keys[mine], 5))
    loss = next_token_loss_sum(hidden.flatten(0, 1), model.head_weight, ids[mine, 1:].flatten())
    for i, moe in model.moe_layers():
        loss = loss + sum(moe.router.loss_weights()[k] * v for k, v in reports[i].aux_losses.items())
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for bank in model.banks.values():
        found.update({n: g.clone() for n, g in bank.split_by_name(tuple(p.grad for p in bank.parameters())).items()})
    return {"loss": loss.detach(), **found}


def summed(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for n, g in part.items():
            found[n] = found.get(n, 0) + g
    return found


@pytest.mark.parametrize("name", ["moe_plus_plus", "recurrent", "chain"])
def test_three_layers_on_three_ranks_recomputed_equal_one_process(name):
    alone = gradients_alone(name)
    for recompute in (False, True):
        found = summed(run_ranks(3, gradients, name, recompute))
        assert found.keys() == alone.keys()
        for n in alone:
            torch.testing.assert_close(found[n], alone[n], rtol=1e-10, atol=1e-10, msg=lambda m, n=n: f"{n}: {m}")


def gradients_alone(name, more=None):
    return run_ranks(1, gradients, name, False, more)[0]


def test_scores_of_a_layer_depend_on_those_before():
    """The later layers' residual matrix has a gradient, the first layer's has none; without residuals there is no matrix."""
    found = gradients_alone("moe_plus_plus")
    assert not found["layers.0.ffn.router.residual"].any()
    assert found["layers.1.ffn.router.residual"].any() and found["layers.2.ffn.router.residual"].any()
    assert "layers.1.ffn.router.residual" not in gradients_alone("moe_plus_plus", {"options": {"residual": False}})


def test_one_recurrent_cell_serves_all_layers():
    found = gradients_alone("recurrent")
    cells = [n for n in found if ".cell." in n]
    assert sorted(cells) == ["layers.0.ffn.router.cell.weight_hh", "layers.0.ffn.router.cell.weight_ih"]
    assert found["layers.0.ffn.router.cell.weight_hh"].any(), "used in later layers, where there is a state before"
