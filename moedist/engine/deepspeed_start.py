"""Bring up DeepSpeed inside moedist's world: on its process group, on its device, without its log lines."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moedist.engine.deepspeed_waits import meter_collectives
from moedist.errors import ConfigError
from moedist.world import NATIVE_BACKENDS, World


class Groups:
    """What DeepSpeed calls an mpu: all ranks are data-parallel ones for the dense parameters, in moedist's own group."""

    def __init__(self, group: Any):
        self._group = group
        self._alone = [dist.new_group([r], backend="gloo") for r in range(dist.get_world_size())][dist.get_rank()]

    def get_data_parallel_group(self) -> Any:
        return self._group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(dist.get_world_size()))

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def start_deepspeed(root: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World) -> Any:
    """The engine of `deepspeed.initialize` around `root`.

    Raises:
        ConfigError: the ranks' devices have no collective library in common.
    """
    _refuse_mixed_devices(world)
    deepspeed = import_deepspeed(world.device, world.local_rank)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            engine, *_ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=world.device.index or 0), model=root, optimizer=optimizer, config=settings,
                mpu=Groups(world.native or dist.group.WORLD), dist_init_required=False)
        except Exception:
            print(said.getvalue())
            raise
    meter_collectives(world.meter)
    return engine


def import_deepspeed(device: torch.device, local_rank: int = 0) -> Any:
    """The module, quiet, for this device, with a process group for a world of one where there is none."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it takes a GPU that this run was told to leave alone
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # MPI and Slurm do not set it, DeepSpeed insists on it
    # DeepSpeed calls what torch 2.13 has renamed
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    # it warns of SGD, and of the dataclasses that routers take and give, which the engine sees to
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # its all-reduce in shared memory serves inference alone, but is compiled at start, for which other ranks and runs wait
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        native = NATIVE_BACKENDS.get(device.type)
        dist.init_process_group(f"cpu:gloo,{device.type}:{native}" if native else "gloo", store=dist.HashStore(),
                                rank=0, world_size=1)
    return deepspeed


def _refuse_mixed_devices(world: World) -> None:
    kinds = world.gather_objects(world.device.type)
    if len(set(kinds)) > 1 or (world.size > 1 and world.device.type != "cpu" and world.native is None):
        raise ConfigError("engine.name=deepspeed needs ranks of one vendor, each with a device of its own; the devices are "
                          f"{', '.join(kinds)} in islands {list(world.islands)}; set engine.name=torch, for any mix")
