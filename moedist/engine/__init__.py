"""Who holds the dense parameters, and the optimizer step over dense and expert parameters."""

from moedist.engine.build import build_engine
from moedist.engine.deepspeed_config import check_deepspeed
from moedist.engine.forward import forward_loss
from moedist.engine.interface import Engine, StepResult
from moedist.engine.optimizer import AdamW
from moedist.engine.replace import replace_experts
from moedist.engine.schedule import learning_rate
from moedist.engine.torch_engine import TorchEngine

__all__ = ["AdamW", "Engine", "StepResult", "TorchEngine", "build_engine", "check_deepspeed", "forward_loss",
           "learning_rate", "replace_experts"]
