"""Who holds the dense parameters, and the optimizer step over dense and expert parameters."""

from moedist.engine.interface import Engine, StepResult
from moedist.engine.replace import replace_experts
from moedist.engine.schedule import learning_rate
from moedist.engine.torch_engine import TorchEngine

__all__ = ["Engine", "StepResult", "TorchEngine", "learning_rate", "replace_experts"]
