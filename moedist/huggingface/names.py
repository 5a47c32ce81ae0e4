"""Which tensors of a Hugging Face model our tensors are made of: one table, read for import and backwards for export.

Ours may be several of theirs one below the other (query, key and value), and the down projection of an expert is stored
with a row per hidden neuron here, a column there. D width, F hidden width of an expert, V rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch

from moedist.config import Config
from moedist.huggingface.families import Family
from moedist.model.forms import expert_prefix


@dataclass(frozen=True)
class Piece:
    """Rows of one of our tensors, as they stand in a tensor of theirs.

    Attributes:
        name, shape: of their tensor.
        transposed: whether it holds our rows as columns.
        rows: which of its rows (columns where transposed) these are; None: all.
        entry: index in a tensor that holds all experts of a layer in one; `shape` is then [E, ...].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    entry: int | None = None

    @property
    def count(self) -> int:
        """Rows of ours."""
        matrix = self.shape if self.entry is None else self.shape[1:]
        return self.rows[1] - self.rows[0] if self.rows else matrix[-1 if self.transposed else 0]

    @property
    def where(self) -> tuple[slice, ...]:
        """The part of their tensor."""
        rows = slice(*self.rows) if self.rows else slice(None)
        inside = (slice(None), rows) if self.transposed else (rows,)
        return inside if self.entry is None else (slice(self.entry, self.entry + 1), *inside)


Pieces = tuple[Piece, ...]


def gather(pieces: Pieces, read: Callable[..., torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of our tensor, their numbers) of every piece; `read(name, *slices)` gives a part of their tensor."""
    start = 0
    for piece in pieces:
        part = read(piece.name, *piece.where)
        part = part if piece.entry is None else part.squeeze(0)
        yield slice(start, start + piece.count), part.t() if piece.transposed else part
        start += piece.count


def scatter(pieces: Pieces, ours: torch.Tensor) -> dict[str, torch.Tensor]:
    """Their tensors, contiguous, of ours: the inverse of `gather` for pieces that are whole tensors."""
    parts = ours.split([piece.count for piece in pieces])
    return {piece.name: (part.t() if piece.transposed else part).contiguous() for piece, part in zip(pieces, parts)}


def dense_pieces(config: Config, family: Family, vocab: int, routers: bool = True) -> dict[str, Pieces]:
    """Our name -> pieces of everything outside the experts; without routers where the source is a dense model."""
    m, moe = config.model, config.moe_layers()
    q, kv = m.heads * m.head, m.kv_heads * m.head
    found = {"embedding.weight": (Piece("model.embed_tokens.weight", (vocab, m.width)),),
             "norm.weight": (Piece("model.norm.weight", (m.width,)),)}
    if not m.tie_embeddings:
        found["head.weight"] = (Piece("lm_head.weight", (vocab, m.width)),)
    for i in range(m.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        attention, block = theirs + "self_attn.", theirs + family.block
        found |= {
            ours + "attention_norm.weight": (Piece(theirs + "input_layernorm.weight", (m.width,)),),
            ours + "ffn_norm.weight": (Piece(theirs + "post_attention_layernorm.weight", (m.width,)),),
            ours + "attention.wqkv.weight": tuple(Piece(f"{attention}{name}_proj.weight", (rows, m.width))
                                                  for name, rows in (("q", q), ("k", kv), ("v", kv))),
            ours + "attention.wo.weight": (Piece(attention + "o_proj.weight", (m.width, q)),)}
        if m.qk_norm != "none":
            wide = (q, kv) if m.qk_norm == "all" else (m.head, m.head)
            found |= {f"{ours}attention.{name}_norm.weight": (Piece(f"{attention}{name}_norm.weight", (n,)),)
                      for name, n in zip("qk", wide)}
        if i in moe and routers:
            found[ours + "ffn.router.weight"] = (Piece(block + ".gate.weight", (m.experts, m.width)),)
        elif i not in moe:
            found |= feed_forward_pieces(ours + "ffn.", theirs + "mlp.", m.width, m.ffn_hidden)
    return found


def feed_forward_pieces(ours: str, theirs: str, width: int, hidden: int) -> dict[str, Pieces]:
    """Of a dense feed-forward."""
    return {ours + "w_in.weight": tuple(Piece(f"{theirs}{name}_proj.weight", (hidden, width)) for name in ("gate", "up")),
            ours + "w_out.weight": (Piece(theirs + "down_proj.weight", (width, hidden)),)}


def expert_pieces(config: Config, family: Family, layer: int, expert: int, hidden: int,
                  fused: bool = False) -> dict[str, Pieces]:
    """Our name -> pieces of one expert of `hidden` neurons.

    Args:
        fused: all experts of a layer are in two tensors, [E, 2F, D] and [E, D, F], as transformers 5 has them in memory.
    """
    width, experts = config.model.width, config.model.experts
    ours, theirs = expert_prefix(layer, expert), f"model.layers.{layer}.{family.block}.experts."
    gate, up, down = (f"{theirs}{expert}.{name}.weight" for name in family.projections)
    if not fused:
        return {ours + "w1": (Piece(gate, (hidden, width)),), ours + "w3": (Piece(up, (hidden, width)),),
                ours + "w2": (Piece(down, (width, hidden), transposed=True),)}
    both, down = (experts, 2 * hidden, width), (experts, width, hidden)
    return {ours + "w1": (Piece(theirs + "gate_up_proj", both, rows=(0, hidden), entry=expert),),
            ours + "w3": (Piece(theirs + "gate_up_proj", both, rows=(hidden, 2 * hidden), entry=expert),),
            ours + "w2": (Piece(theirs + "down_proj", down, transposed=True, entry=expert),)}


def names_of(tables: Sequence[dict[str, Pieces]]) -> dict[str, tuple[int, ...]]:
    """Their name -> shape of everything that the tables speak of."""
    return {piece.name: piece.shape for table in tables for pieces in table.values() for piece in pieces}
