"""How much a model computes for a token: experts by the rows they got and the forms they have, all else as torch counts it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moedist.data import EvalStream
from moedist.engine.forward import hidden_states
from moedist.model import Batch, Transformer
from moedist.phases.evaluation import EVAL_SEED
from moedist.world import World


class Flops(NamedTuple):
    """Of the forward pass, a token: of all, and of the routed experts; and rows of experts a token, mean over layers."""

    total: float
    experts: float
    rows: float


@torch.no_grad()
def flops_per_token(model: Transformer, stream: EvalStream, world: World, dtype: torch.dtype, sequences: int) -> Flops:
    """Multiply-adds times two of all matrix products, forward, over the first `sequences` sequences.

    Experts count by their rows times `Bank.flops_per_row`, whatever kernel computes them; router, mixing (Soft MoE), shared
    experts and attention (every token with all of its sequence, although half is masked) as `torch.utils.flop_counter` sees
    them; and the output projection.
    """
    inputs, _ = stream.batch(0, min(sequences, stream.sequences))
    batch = Batch(inputs, torch.arange(inputs.numel()).view_as(inputs), EVAL_SEED)
    counter, in_banks, before = FlopCounterMode(display=False), [0], [0]
    banks = [moe.bank for _, moe in model.moe_layers()]
    hooks = [bank.register_forward_pre_hook(lambda *_: before.__setitem__(0, counter.get_total_flops())) for bank in banks]
    hooks += [bank.register_forward_hook(lambda *_: in_banks.__setitem__(
        0, in_banks[0] + counter.get_total_flops() - before[0])) for bank in banks]
    was_training = model.training
    model.eval()
    try:
        # attention by plain products: fused kernels are not counted on every device
        with sdpa_kernel(SDPBackend.MATH), counter:
            _, reports = hidden_states(model, batch.to(world.device), dtype)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    experts = rows = 0.0
    for layer, moe in model.moe_layers():
        of_row = dict(zip(moe.bank.expert_ids, moe.bank.flops_per_row))
        load_E = reports[layer].load_WE.sum(0).tolist()
        experts += sum(n * of_row[e] for e, n in enumerate(load_E))
        rows += sum(load_E) / len(list(model.routed_layers()))
    tokens = inputs.numel()
    others = counter.get_total_flops() - in_banks[0] + 2 * model.head_weight.numel() * tokens
    return Flops((others + experts) / tokens, experts / tokens, rows / tokens)
