"""The network: transformer, MoE layer, expert banks, loss."""

from moedist.model.experts import ExpertBank
from moedist.model.loss import next_token_loss_sum
from moedist.model.moe import LayerReport, MoELayer
from moedist.model.transformer import Batch, Transformer

__all__ = ["Batch", "ExpertBank", "LayerReport", "MoELayer", "Transformer", "next_token_loss_sum"]
