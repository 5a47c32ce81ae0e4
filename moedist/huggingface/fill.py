"""Fill a model with the tensors of a source: what is replicated on every rank, an expert where it lives."""

from __future__ import annotations

from typing import Mapping

import torch

from moedist.config import Config
from moedist.errors import CheckpointError, ConfigError
from moedist.huggingface.families import Family
from moedist.huggingface.names import Pieces, dense_pieces, expert_pieces, gather, names_of
from moedist.huggingface.source import CONFIG, Source
from moedist.huggingface.upcycle import Upcycle
from moedist.model.forms import GLOBAL_NAME



class Table:
    """Our name -> pieces, for a source and what is to become of it."""

    def __init__(self, source: Source, config: Config, family: Family, upcycle: Upcycle | None):
        self.source, self.config, self.family, self.upcycle = source, config, family, upcycle
        rows = config.model.vocab_rows(0)
        self.dense = dense_pieces(config, family, rows, routers=upcycle is None)
        if upcycle is not None:
            self.dense |= upcycle.shared_pieces(config)
        first = config.moe_layers()[0]
        self.fused = f"model.layers.{first}.{family.block}.experts.gate_up_proj" in source.files

    def expert(self, layer: int, expert: int) -> dict[str, Pieces]:
        """Pieces of one expert's tensors."""
        if self.upcycle is not None:
            return self.upcycle.expert_pieces(self.config, layer, expert)
        return expert_pieces(self.config, self.family, layer, expert, self.config.model.expert_hidden, self.fused)

    def check(self) -> None:
        """Every tensor that is needed is there, in its shape, and none that would be left out. Reads headers alone.

        Raises:
            CheckpointError, ConfigError.
        """
        experts = [self.expert(i, e) for i in self.config.moe_layers() for e in range(self.config.model.experts)]
        wanted = names_of([self.dense, *experts])
        for name, shape in wanted.items():
            if (found := self.source.shape(name)) != shape:
                raise CheckpointError(f"{self.source.path} has {name} of shape {found}, its {CONFIG} makes it {shape}; is the "
                                      "folder of one model?")
            if self.source.dtype(name) == torch.float64 and self.config.train.dtype != "float64":
                raise ConfigError(f"{self.source.path} has {name} in float64; set train.dtype=float64, or its weights would "
                                  "be rounded")
        extra = sorted(self.source.files.keys() - wanted.keys() - ({"lm_head.weight"} if self.config.model.tie_embeddings
                                                                   else set()))
        if extra:
            raise ConfigError(f"{self.source.path} has {len(extra)} tensors that {self.family.model_type} models have no place"
                              f" for here, such as {extra[0]!r}; supported are models without biases and adapters")


def fill(table: Table, tensors: Mapping[str, torch.Tensor], seed: int) -> None:
    """Write the source's numbers into tensors of a model, one after another.

    Args:
        tensors: by global name, writable; those of experts that live here, and everything that is replicated. Optimizer
            state is left alone.
    """
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("optimizer.") or ".router.bias" in name:  # of balancing: no source has it, it starts from zero
                continue
            match = GLOBAL_NAME.fullmatch(name)
            pieces = table.expert(int(match[1]), int(match[2])) if match else table.dense
            if name in pieces:
                for rows, part in gather(pieces[name], table.source.read):
                    tensor[rows].copy_(part)
            elif not (table.upcycle and name.endswith("router.weight")):
                raise ConfigError(f"nothing in {table.family.model_type} models stands for {name}; leave router.* and model.* "
                                  "as they are imported")
            if table.upcycle is not None:
                table.upcycle.finish(name, tensor, seed)
