"""The network: transformer, MoE layer, expert banks, loss."""

from moedist.model.bank import Bank, BankTensors
from moedist.model.consistency import consistency_loss_sum
from moedist.model.experts import ExpertBank, build_bank
from moedist.model.factored import FactoredBank
from moedist.model.forms import ExpertForm
from moedist.model.kv_cache import KVCache
from moedist.model.loss import next_token_loss_sum
from moedist.model.moe import LayerReport, MoELayer, PooledLayer
from moedist.model.transformer import Batch, Transformer

__all__ = ["Bank", "BankTensors", "Batch", "ExpertBank", "ExpertForm", "FactoredBank", "KVCache", "LayerReport", "MoELayer",
           "PooledLayer", "Transformer", "build_bank", "consistency_loss_sum", "next_token_loss_sum"]
