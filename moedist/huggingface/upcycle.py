"""Upcycling: a dense model becomes a mixture of experts that computes the same, and goes on training from there.

Every expert is a copy of the block's feed-forward, and the router is new: Sparse Upcycling (Komatsuzaki et al. 2022, arXiv
2212.05055). Finer experts come from cutting the feed-forward into G shards by hidden neurons, with the virtual-group
initialisation of He et al. 2024 (arXiv 2410.07524, section 2): expert `group * G + shard` holds that shard, the G experts of
a group share one router row, so the K * G likeliest experts of a token are all shards of K groups.

When the first logits equal the dense model's. Let w be a token's weights, which sum to one over the K * G chosen experts, and
FFN = sum of its shards. A chosen group's G weights are equal, so the experts add up to sum_group w_group * FFN = FFN / G, and
G times that is restored by scaling what is linear in an expert's output: its up projection by a and its down projection by
G / a. (The paper scales gate, up and down by the cube root of G, which is not the same function under SiLU.) A shared copy of
the feed-forward, which sees every token, takes half of the output and leaves half to the experts. So they are equal
- up to rounding, where noise is 0, whatever G, K and E are;
- with weights that are exact copies, or such times powers of two, where G is a power of two: also in bfloat16.
Not where noise is above 0: then each expert's matrices get normal noise of that share of their standard deviation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping

import torch

from moedist.config import Config
from moedist.errors import ConfigError
from moedist.huggingface.names import Piece, Pieces, feed_forward_pieces
from moedist.model.forms import expert_prefix
from moedist.model.initialise import fill_normal


@dataclass(frozen=True)
class Upcycle:
    """What `--upcycle` says.

    Attributes:
        experts, top_k: copies of the feed-forward, and how many of them a token is sent to.
        granularity: G, shards that each copy is cut into; the model has G times as many experts, and a token as many more.
        noise: standard deviation of what is added to every expert, over that of its matrices.
        shared: 1: another copy sees every token; 0: none does.
        every: every n-th block becomes a mixture.
    """

    experts: int = 8
    top_k: int = 2
    granularity: int = 1
    noise: float = 0.0
    shared: int = 0
    every: int = 1

    @classmethod
    def parse(cls, text: str) -> "Upcycle":
        """From `experts=8,top_k=2`; what is left out has its default.

        Raises:
            ConfigError: an unknown name, or a number out of range.
        """
        kinds = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                values[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise ConfigError(f"--upcycle has {part!r}; write it as experts=8,top_k=2, with numbers for some of "
                                  f"{', '.join(kinds)}") from None
        found = cls(**values)
        if min(found.experts, found.top_k, found.granularity, found.every) < 1 or found.noise < 0 \
                or found.shared not in (0, 1) or found.top_k > found.experts:
            raise ConfigError(f"--upcycle {text}: experts, top_k, granularity and every are 1 or more, top_k at most experts, "
                              "noise 0 or more, shared 0 or 1")
        return found

    def model_keys(self, model: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Keys of `model` for a dense model that has these.

        Raises:
            ConfigError: the feed-forward cannot be cut into so many shards.
        """
        hidden, g = model["ffn_hidden"], self.granularity
        if hidden % g:
            raise ConfigError(f"{where}: intermediate_size is {hidden}, which cannot be cut into granularity={g} equal "
                              f"shards; choose a divisor of {hidden}")
        return {"experts": self.experts * g, "top_k": self.top_k * g, "expert_hidden": hidden // g,
                "shared_experts": self.shared * g, "moe_every": self.every}

    @property
    def up_scale(self) -> float:
        """Factor of an up projection: about the root of G, exact in any floating-point format."""
        return 2.0 ** ((self.granularity.bit_length() - 1) // 2)

    @property
    def down_scale(self) -> float:
        """Factor of a down projection."""
        return self.granularity / self.up_scale / (1 + self.shared)

    def expert_pieces(self, config: Config, layer: int, expert: int) -> dict[str, Pieces]:
        """Our name -> pieces of one expert, all rows of the dense model's feed-forward."""
        m = config.model
        ours, theirs, shard = expert_prefix(layer, expert), f"model.layers.{layer}.mlp.", expert % self.granularity
        full, rows = m.expert_hidden * self.granularity, (shard * m.expert_hidden, (shard + 1) * m.expert_hidden)
        return {ours + "w1": (Piece(theirs + "gate_proj.weight", (full, m.width), rows=rows),),
                ours + "w3": (Piece(theirs + "up_proj.weight", (full, m.width), rows=rows),),
                ours + "w2": (Piece(theirs + "down_proj.weight", (m.width, full), transposed=True, rows=rows),)}

    def shared_pieces(self, config: Config) -> dict[str, Pieces]:
        """Our name -> pieces of the shared copies."""
        found: dict[str, Pieces] = {}
        for i in config.moe_layers() if self.shared else ():
            found |= feed_forward_pieces(f"layers.{i}.ffn.shared.", f"model.layers.{i}.mlp.", config.model.width,
                                         config.model.expert_hidden * self.granularity)
        return found

    @torch.no_grad()
    def finish(self, name: str, tensor: torch.Tensor, seed: int) -> None:
        """Turn a tensor of ours from a copy into what it starts from, in place; the same on every rank.

        Args:
            name: global name; a router's weights [E, D] hold fresh normal numbers.
        """
        if name.endswith("ffn.router.weight"):
            tensor.copy_(tensor[::self.granularity].repeat_interleave(self.granularity, dim=0))
        elif name.endswith("ffn.shared.w_out.weight"):
            tensor.mul_(1 / (1 + self.shared))
        elif ".experts." in name:
            if self.noise:
                noise = torch.empty_like(tensor)
                fill_normal(noise, self.noise * tensor.std().item(), seed, f"upcycle {name}")
                tensor.add_(noise)
            tensor.mul_({"w1": 1.0, "w3": self.up_scale, "w2": self.down_scale}[name.rpartition(".")[2]])
