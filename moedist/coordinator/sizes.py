"""How large the parts of a model are, and how much work a step is: what planning needs to know of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Mapping, Sequence

from moedist.config import Config
from moedist.data.tokenizer import BYTE_VOCAB, Tokenizer
from moedist.model import ExpertForm
from moedist.routing import router_of

STATES = 4  # values a parameter takes while training: weight, gradient, two Adam moments


@dataclass(frozen=True)
class Sizes:
    """Of a model and its training step.

    Attributes:
        experts, moe_layers: as configured; `moe_layers` are indices of blocks.
        rows_per_token: expert rows of a layer per token, as its router expects them.
        iterations: how often tokens go through the experts of a layer in one forward pass, by its router or by those of other
            layers.
        part, calls: sequences of one forward pass over all ranks, and forward passes of a step.
        sequence: tokens of a sequence.
        hidden: hidden width of an expert, mean.
        expert_bytes: weights of one expert.
        dense_bytes: weights of all that is not expert.
        token_bytes: activations that one token of one forward pass keeps until its backward pass, estimated.
        row_bytes: one row of activations, as it is sent.
        costs: layer -> work of a row of each expert, [E], over that of an uncompressed one; a layer not here has 1 for all.
    """

    experts: int
    rows_per_token: float
    moe_layers: tuple[int, ...]
    part: int
    calls: int
    sequence: int
    hidden: float
    expert_bytes: int
    dense_bytes: int
    token_bytes: int
    row_bytes: int
    costs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    iterations: int = 1

    @classmethod
    def of(cls, config: Config, vocab: int) -> "Sizes":
        m, t = config.model, config.train
        value = 8 if t.dtype == "float64" else 4
        gate = 3 if m.activation == "swiglu" else 2
        moe, routed, router = config.moe_layers(), len(config.routed_layers()), router_of(config)
        router_size = sum(p.numel() for p in router.parameters())
        attention = 2 * m.width * m.head * (m.heads + m.kv_heads)
        attention += {"none": 0, "head": 2, "all": m.heads + m.kv_heads}[m.qk_norm] * m.head
        dense = m.vocab_rows(vocab) * m.width * (1 if m.tie_embeddings else 2) + m.layers * attention \
            + (m.layers - routed) * gate * m.width * m.ffn_hidden + (2 * m.layers + 1) * m.width \
            + routed * (router_size + gate * m.width * m.expert_hidden * m.shared_experts)
        low = 2 if t.dtype in ("bfloat16", "float16") else value
        # per block: norms and residuals, q, k, v, attention's result, rows in and out with their hidden values
        rows = router.most_rows_per_token() / router.draws  # all else doubles with the draws too
        block = m.width * (2 * value + 4 * low) + math.ceil(rows * (2 * m.width + (gate - 1) * m.expert_hidden) * low)
        per_token = router.draws * ((m.width * value * m.layers if m.recompute else block * m.layers) + block)
        return cls(m.experts, m.pool_layers * router.expected_rows_per_token(), tuple(moe), t.batch // t.accumulate,
                   t.accumulate, config.data.sequence_length, m.expert_hidden,
                   gate * m.width * m.expert_hidden * value, dense * value, per_token, m.width * low,
                   iterations=m.pool_layers * router.iterations)

    def compressed(self, forms: Mapping[int, Mapping[int, ExpertForm]], value_bytes: int) -> "Sizes":
        """With experts as they are stored now.

        Args:
            forms: layer -> expert -> form, of all experts.
            value_bytes: of one number.
        """
        whole = self.expert_bytes / value_bytes
        found = [form.numbers for of_layer in forms.values() for form in of_layer.values()]
        costs = {i: tuple(of_layer[e].numbers / whole for e in range(self.experts)) for i, of_layer in forms.items()}
        mean = sum(found) / len(found)
        return replace(self, hidden=self.hidden * mean * value_bytes / self.expert_bytes, expert_bytes=int(mean * value_bytes),
                       costs=costs)

    def work(self, layer: int, rows: Sequence[float]) -> list[float]:
        """[E] rows of every expert as so many rows of an uncompressed one."""
        costs = self.costs.get(layer)
        return list(rows) if costs is None else [n * cost for n, cost in zip(rows, costs)]

    @property
    def mean_cost(self) -> float:
        """Work of a row, mean over all experts."""
        found = [cost for of_layer in self.costs.values() for cost in of_layer]
        return sum(found) / len(found) if found else 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.part * self.calls * self.sequence

    @property
    def expert_calls(self) -> int:
        """Times that the experts of a layer are called in a step, forward and backward."""
        return self.calls * self.iterations

    @property
    def rows(self) -> int:
        """Expert rows of a layer in one step."""
        return round(self.tokens * self.rows_per_token)

    def expert_slots(self, free_bytes: float) -> int:
        """Experts of one layer that fit beside the dense part and one sequence, when every MoE layer gets as many."""
        left = free_bytes - STATES * self.dense_bytes - self.sequence * self.token_bytes
        per_slot = STATES * self.expert_bytes * max(len(self.moe_layers), 1)
        return max(0, int(left // per_slot))

    def sequence_slots(self, free_bytes: float, experts: int) -> int:
        """Sequences of one forward pass that fit beside the dense part and `experts` experts over all layers."""
        left = free_bytes - STATES * (self.dense_bytes + experts * self.expert_bytes)
        return max(0, int(left // (self.sequence * self.token_bytes)))


def likely_vocab(config: Config) -> int:
    """Size of the vocabulary without reading any text: a bpe tokenizer that is yet to be trained has what is asked for."""
    kind = config.data.tokenizer
    return {"byte": BYTE_VOCAB, "bpe": config.data.vocab}.get(kind) or Tokenizer.from_file(kind).vocab_size
