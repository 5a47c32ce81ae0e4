"""The coordinator: measures every rank, plans, and moves experts while training goes on."""

from moedist.coordinator.coordinator import Coordinator
from moedist.coordinator.migrate import migrate
from moedist.coordinator.sizes import Sizes
from moedist.coordinator.speeds import RankTimes
from moedist.coordinator.start import equal_plan, plan_again, start_plan, written_plan

__all__ = ["Coordinator", "RankTimes", "Sizes", "equal_plan", "migrate", "plan_again", "start_plan", "written_plan"]
