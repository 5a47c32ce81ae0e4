"""Which rank owns which experts and how much of the batch: plain data and pure functions, no torch, no processes."""

from moedist.placement.baselines import equal_layer, lpt_layer, proportional_layer
from moedist.placement.batch import plan_batch
from moedist.placement.cost import bound, makespan, rank_loads
from moedist.placement.from_config import plan_from_config
from moedist.placement.plan import LayerPlan, Plan, moved_placements
from moedist.placement.problem import Problem
from moedist.placement.replan import Replan, replan_layer
from moedist.placement.shares import equal_counts, split_batch
from moedist.placement.solve import plan_layer
from moedist.placement.targets import furthest, target_shares
from moedist.placement.token_shares import best_shares

__all__ = ["LayerPlan", "Plan", "Problem", "Replan", "best_shares", "bound", "equal_counts", "equal_layer", "furthest",
           "lpt_layer", "makespan", "moved_placements", "plan_batch", "plan_from_config", "plan_layer", "proportional_layer",
           "rank_loads", "replan_layer", "split_batch", "target_shares"]
