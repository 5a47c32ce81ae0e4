"""The decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, dense or MoE feed-forwards.

G sequences of S tokens on this rank, D width, H heads, J key/value heads, C head width (D / H unless configured).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moedist.config import Config, ModelConfig
from moedist.dispatch import Layout, Transport, build_dispatcher, choose_sharing
from moedist.errors import ConfigError
from moedist.model.activations import ACTIVATIONS
from moedist.model.bank import Bank
from moedist.model.experts import build_bank
from moedist.model.feed_forward import FeedForward
from moedist.model.forms import ExpertForm
from moedist.model.initialise import fill_normal
from moedist.model.kv_cache import KVCache, LayerCache
from moedist.model.moe import LayerReport, MoELayer, PooledLayer, joined
from moedist.placement import Plan
from moedist.routing import RouterInput, build_router, mix_seeds, router_of
from moedist.timing import Meter, region


@dataclass(frozen=True)
class Batch:
    """Token ids [G, S] with each token's place in the global batch (int64), and the seed of the routing noise."""

    ids_GS: torch.Tensor
    keys_GS: torch.Tensor
    seed: int

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids_GS.to(device), self.keys_GS.to(device), self.seed)


def rotary_tables(positions: torch.Tensor, head: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [S, C] of S rotary positions (Su et al. 2021, arXiv 2104.09864), halves layout as in Llama."""
    device = positions.device
    frequencies = base ** (-torch.arange(0, head, 2, device=device, dtype=torch.float64 if device.type == "cpu" else
                                         torch.float32) / head)
    angles = positions.to(frequencies.dtype).unsqueeze(1) * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn [G, H, S, C] by position."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245); query, key and value in one matrix.

    Queries and keys may be normalised (Henry et al. 2020, arXiv 2010.04245, with RMSNorm): `head` normalises the C values
    of each head, as Qwen3 does, `all` the H*C or J*C values of all heads, as OLMoE does. Then all three may be clipped.
    """

    def __init__(self, m: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head, self.clip = m.heads, m.kv_heads, m.head, m.clip_qkv
        self.wqkv = nn.Linear(m.width, (m.heads + 2 * m.kv_heads) * m.head, bias=False)
        self.wo = nn.Linear(m.heads * m.head, m.width, bias=False)
        if m.qk_norm != "none":
            heads = (m.heads, m.kv_heads) if m.qk_norm == "all" else (1, 1)
            self.q_norm, self.k_norm = (nn.RMSNorm(n * m.head, eps=m.norm_eps) for n in heads)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x_GSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                past: LayerCache | None = None) -> torch.Tensor:
        g, s, _ = x_GSD.shape
        qkv = self.wqkv(x_GSD).view(g, s, self.heads + 2 * self.kv_heads, self.head)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = normalised(q, self.q_norm), normalised(k, self.k_norm)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = rotate(q, cos.to(q.dtype), sin.to(q.dtype)), rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        if past is not None:
            y = past.attend(q, k, v)
        elif g:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        else:  # a rank with no sequences: attention kernels refuse empty batches, the graph must still reach q, k, v
            y = q + 0 * (k.sum() + v.sum())
        return self.wo(y.transpose(1, 2).reshape(g, s, self.heads * self.head))


def normalised(x: torch.Tensor, norm: nn.RMSNorm | None) -> torch.Tensor:
    """[G, S, heads, C] after a norm over each head or over all of them, whichever is its width; None: as it is."""
    if norm is None:
        return x
    wide = x.float() if x.dtype.itemsize == 2 else x  # of autocast's low precision: a norm needs more
    return norm(wide if norm.normalized_shape[0] == x.shape[-1] else wide.flatten(2)).view(x.shape).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, m: ModelConfig, feed_forward: nn.Module):
        super().__init__()
        self.attention_norm = nn.RMSNorm(m.width, eps=m.norm_eps)
        self.attention = Attention(m)
        self.ffn_norm = nn.RMSNorm(m.width, eps=m.norm_eps)
        self.ffn = feed_forward
        self.dropout = m.dropout

    def forward(self, x_GSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ids_GS: torch.Tensor,
                keys_GS: torch.Tensor, seed: int, carried: torch.Tensor | None = None,
                past: LayerCache | None = None) -> tuple[torch.Tensor, LayerReport | None]:
        with region("dense"):
            x = x_GSD + self._drop(self.attention(self.attention_norm(x_GSD), cos, sin, past))
            normed, report = self.ffn_norm(x), None
        if isinstance(self.ffn, (MoELayer, PooledLayer)):
            if torch.is_autocast_enabled(x.device.type):  # dispatch moves rows in the compute dtype
                normed = normed.to(torch.get_autocast_dtype(x.device.type))
            y, report = self.ffn(RouterInput(normed, ids_GS, keys_GS, seed, self.training, carried))
        else:
            with region("dense"):
                y = self.ffn(normed)
        return x + self._drop(y), report

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Transformer(nn.Module):
    """Token ids in, hidden states out; `head_weight` turns them into logits (see `moedist.model.loss`).

    The module tree holds the dense parameters only; `banks` holds the experts of this rank.

    Args:
        forms: layer -> expert -> in what form it is stored, of all experts or of those that compression has changed;
            all others are dense, of the configured width.
    """

    def __init__(self, config: Config, vocab: int, plan: Plan, transport: Transport, device: torch.device,
                 dtype: torch.dtype, meter: Meter | None = None,
                 forms: Mapping[int, Mapping[int, ExpertForm]] | None = None):
        super().__init__()
        m = self.m = config.model
        if m.vocab_rows(vocab) < vocab:
            raise ConfigError(f"model.vocab ({m.vocab}) has no room for the {vocab} tokens of the tokenizer; set "
                              f"model.vocab={vocab} or more, or null")
        whole = ExpertForm.dense(m.width, m.expert_hidden, ACTIVATIONS[m.activation] == 2)
        self.banks: dict[int, Bank] = _Hidden()
        blocks, first = [], None
        # a row of Soft MoE mixes tokens for one expert
        rows_per_token = 1.0 if config.router.name == "soft_moe" else (asked := router_of(config)).most_rows_per_token() / (
            asked.iterations * asked.draws)
        sharing = choose_sharing(config.dispatch, transport, rows_per_token)
        routed = config.routed_layers()
        for i in range(m.layers):
            if i in routed:
                router = build_router(m.width, m.experts, m.top_k, config.router, config.data.sequence_length)
                router.take_place(routed.index(i) % m.pool_layers, m.pool_layers)
                if first is None:
                    first = router
                else:
                    router.follow(first)
                shared = FeedForward(m.width, m.expert_hidden * m.shared_experts, m.activation) \
                    if m.shared_experts else None
            if i in config.moe_layers():
                layout = Layout(plan.layer(i), transport.rank, transport.world_size, getattr(transport, "islands", ()))
                of_layer = (forms or {}).get(i, {})
                local = [of_layer.get(e, whole) for e in layout.local_experts]
                bank = self.banks[i] = build_bank(i, layout.local_experts, local, m.width, m.activation, device, dtype)
                dispatcher = build_dispatcher(layout, transport, device, sharing, None if meter is None else (i, meter))
                ffn: nn.Module = MoELayer(router, bank, dispatcher, shared, meter)
                owner = ffn
                if any(form.is_lowbit for form in of_layer.values()):
                    ffn.restored = config.restored(i)
            elif i in routed:
                ffn = PooledLayer(router, owner, shared)
            else:
                ffn = FeedForward(m.width, m.ffn_hidden, m.activation)
            blocks.append(Block(m, ffn))
        rows = m.vocab_rows(vocab)
        self.embedding = nn.Embedding(rows, m.width)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(m.width, eps=m.norm_eps)
        self.head = None if m.tie_embeddings else nn.Linear(m.width, rows, bias=False)
        self.to(device=device, dtype=dtype)
        self._initialise(config.seed)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D] output projection."""
        return self.embedding.weight if self.head is None else self.head.weight

    def moe_layers(self) -> Iterator[tuple[int, MoELayer]]:
        """(index of the block, its MoE layer) of those that have experts of their own."""
        return ((i, block.ffn) for i, block in enumerate(self.layers) if isinstance(block.ffn, MoELayer))

    def routed_layers(self) -> Iterator[tuple[int, int, MoELayer | PooledLayer]]:
        """(index of the block, of the block whose experts it sends to, its layer) of all blocks with a router."""
        owner = 0
        for i, block in enumerate(self.layers):
            owner = i if isinstance(block.ffn, MoELayer) else owner
            if isinstance(block.ffn, (MoELayer, PooledLayer)):
                yield i, owner, block.ffn

    @property
    def draws(self) -> int:
        """Passes that a training batch makes, see `Router.draws`."""
        return max((layer.router.draws for _, layer in self.moe_layers()), default=1)

    @property
    def causal(self) -> bool:
        """False where a router lets a token see later ones."""
        return all(layer.router.causal for _, layer in self.moe_layers())

    def dense_state(self) -> dict[str, torch.Tensor]:
        """Weights and buffers outside the experts by name; detached views that can be written."""
        return {name: t.detach() for name, t in self.state_dict().items()}

    def named_state(self) -> dict[str, torch.Tensor]:
        """Weights and buffers by global name, this rank's experts included; detached views that can be written."""
        found = self.dense_state()
        for bank in self.banks.values():
            found.update(bank.named_weights() | bank.named_indices())
        return found

    def forward(self, batch: Batch, cache: KVCache | None = None) -> tuple[torch.Tensor, dict[int, LayerReport]]:
        """([G, S, D] normalised hidden states, report of every MoE layer, see `moe_layers`).

        With a cache, the batch is [T, 1], the tokens that `KVCache.begin` has announced; routers then see sequences of one
        token.
        """
        x = self.embedding(batch.ids_GS)
        positions = torch.arange(x.shape[1], device=x.device) if cache is None else cache.positions_T
        cos, sin = rotary_tables(positions, self.m.head, self.m.rope_base, x.dtype)
        if cache is not None:  # [T, 1, 1, C]: a position for every sequence of one token
            cos, sin = cos[:, None, None], sin[:, None, None]
        reports, carried, owner = {}, None, 0
        for i, block in enumerate(self.layers):
            args = (x, cos, sin, batch.ids_GS, batch.keys_GS, mix_seeds(batch.seed, i), carried,
                    None if cache is None else cache.layers[i])
            if self.m.recompute and self.training:
                # without the early stop every rank repeats the same collectives, whatever it saved
                with set_checkpoint_early_stop(False):
                    x, report = checkpoint(block, *args, use_reentrant=False)
            else:
                x, report = block(*args)
            if report is not None:
                owner, carried = i if isinstance(block.ffn, MoELayer) else owner, report.carried
                reports[owner] = joined([reports[owner], report]) if owner in reports else report
        return self.norm(x), reports

    def _initialise(self, seed: int) -> None:
        std = self.m.init_std
        out_std = std / (2 * self.m.layers) ** 0.5  # GPT-2: residual writers shrink with depth
        for name, p in self.named_parameters():
            if p.dim() > 1:
                usual = out_std if name.endswith(("wo.weight", "w_out.weight")) else std
                fill_normal(p, getattr(p, "init_std", usual), seed, name)  # a router may know better
        for bank in self.banks.values():
            bank.initialise(seed, std, out_std)


class _Hidden(dict):
    """A dict that nn.Module does not look into: experts stay out of the module tree."""
