"""The engine that a configuration asks for."""

from __future__ import annotations

from moedist.config import Config
from moedist.engine.interface import Engine
from moedist.engine.torch_engine import TorchEngine
from moedist.errors import ConfigError
from moedist.model import Transformer
from moedist.world import World


def build_engine(model: Transformer, config: Config, world: World) -> Engine:
    """Every rank must call it.

    Raises:
        ConfigError: the ranks' devices cannot do what `config.engine` says.
    """
    if config.engine.name == "torch":
        return TorchEngine(model, config.train, world)
    from moedist.engine.deepspeed_engine import DeepSpeedEngine
    if config.engine.offload == "cpu" and world.device.type == "cpu":
        raise ConfigError(f"engine.offload=cpu keeps optimizer state in host memory, but rank {world.rank} trains on the CPU, "
                          "where all is there already; set engine.offload=none")
    return DeepSpeedEngine(model, config.train, world, config.engine)
