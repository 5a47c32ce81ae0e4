"""Which rank owns which experts and how much of the batch: plain data and pure functions, no torch, no processes."""

from moedist.placement.from_config import plan_from_config
from moedist.placement.plan import LayerPlan, Plan
from moedist.placement.shares import equal_counts, split_batch

__all__ = ["LayerPlan", "Plan", "equal_counts", "plan_from_config", "split_batch"]
