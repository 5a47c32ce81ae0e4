"""What a run is: frozen dataclasses (`schema`), read from YAML and overrides (`load`), checked (`check`)."""

from moedist.config.check import check_config, profile_steps
from moedist.config.load import (
    FileKind, compress_config, compress_options, config_from_dict, describe_fields, describe_keys, load_config,
    load_dataclass, phases_override, to_yaml,
)
from moedist.config.ranks import for_ranks, number_islands
from moedist.config.schema import (
    CheckpointConfig, CompressConfig, Config, DataConfig, DispatchConfig, EngineConfig, LowBitConfig, ModelConfig,
    MonitorConfig, OffloadConfig, PlacementConfig, RouterConfig, TrainConfig, WorldConfig, key,
)

__all__ = [
    "CheckpointConfig", "CompressConfig", "Config", "DataConfig", "DispatchConfig", "EngineConfig", "FileKind",
    "LowBitConfig", "ModelConfig", "MonitorConfig", "OffloadConfig", "PlacementConfig", "RouterConfig", "TrainConfig",
    "WorldConfig", "check_config", "compress_config", "compress_options", "config_from_dict", "describe_fields",
    "describe_keys", "for_ranks", "key", "load_config", "load_dataclass", "number_islands", "phases_override",
    "profile_steps", "to_yaml",
]
