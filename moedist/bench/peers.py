"""Other people's MoE layers with the weights of ours: Hugging Face's Mixtral block and DeepSpeed's MoE."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Callable, Iterator

import torch
from torch import nn

from moedist.engine.deepspeed_start import import_deepspeed
from moedist.model.feed_forward import FeedForward
from moedist.model.moe import MoELayer

Forward = Callable[[torch.Tensor], torch.Tensor]
Peer = tuple[nn.Module, Forward]


def peers_of(layer: MoELayer, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Peer], list[str]]:
    """({name: (module, forward of [1, T, D])}, names left out with the reason), all computing what `layer` computes."""
    found, left_out = {}, []
    for name, build in _hugging_face(layer, tokens, dtype, left_out):
        found[name] = build()
    try:
        found["deepspeed"] = _deepspeed(layer, dtype, device)
    except ImportError as error:
        left_out.append(f"deepspeed: {error}")
    return {n: (m.to(device=device, dtype=dtype), f) for n, (m, f) in found.items()}, left_out


def copy_to_hugging_face(layer: MoELayer, implementation: str = "eager") -> nn.Module:
    """A `MixtralSparseMoeBlock` with this layer's weights (swiglu experts of one width, all on this rank)."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    bank, router = layer.bank, layer.router
    experts, hidden = len(bank.expert_ids), bank.widths[0]
    config = MixtralConfig(hidden_size=bank.width, intermediate_size=hidden, num_local_experts=experts,
                           num_experts_per_tok=router.top_k, hidden_act="silu")
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight = nn.Parameter(router.weight.detach().clone())
        block.experts.gate_up_proj = nn.Parameter(bank.w_in.detach().view(experts, 2 * hidden, -1).clone())
        block.experts.down_proj = nn.Parameter(bank.w_out.detach().view(experts, hidden, -1).mT.contiguous())
    return block


def _hugging_face(layer: MoELayer, tokens: int, dtype: torch.dtype,
                  left_out: list[str]) -> Iterator[tuple[str, Callable[[], Peer]]]:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        left_out.append(f"transformers: {error}")
        return
    for implementation in ["eager", *ALL_EXPERTS_FUNCTIONS]:
        name = f"transformers {implementation}"
        if implementation in ("deepgemm", "sonicmoe"):
            left_out.append(f"{name}: needs its own CUDA kernels")
            continue
        # batched_mm gathers the weights of every row, and autograd keeps them and their gradients
        rows = tokens * layer.router.top_k
        needed = 2 * rows * 3 * layer.bank.widths[0] * layer.bank.width * dtype.itemsize
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if implementation == "batched_mm" and needed > 0.7 * free:
            left_out.append(f"{name}: would need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
            continue

        def build(implementation: str = implementation) -> Peer:
            block = copy_to_hugging_face(layer, implementation)
            return block, block

        yield name, build


def _deepspeed(layer: MoELayer, dtype: torch.dtype, device: torch.device) -> Peer:
    """DeepSpeed's MoE, no token dropped, in a world of one."""
    # it prints while it sets up
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        deepspeed = import_deepspeed(device)
        from deepspeed.moe.layer import MoE

        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_init_required=False, verbose=False)
        bank, router = layer.bank, layer.router
        expert = FeedForward(bank.width, bank.widths[0], bank.activation)
        moe = MoE(bank.width, expert, num_experts=len(bank.expert_ids), k=router.top_k, drop_tokens=False,
                  use_rts=False, top2_2nd_expert_sampling=False)
        moe.set_deepspeed_parallelism()
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(router.weight)
        for i, copy in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            hidden = bank.widths[0]
            copy.w_in.weight.copy_(bank.w_in[2 * hidden * i:2 * hidden * (i + 1)])
            copy.w_out.weight.copy_(bank.w_out[hidden * i:hidden * (i + 1)].t())
    return moe, lambda x: moe(x)[0]
