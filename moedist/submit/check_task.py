"""What every rank of `moedist submit --check` does: says what it sees, by itself, then together with the others.

Facts go into check/RANK.json of the job's folder: before ranks have met, so that those of a kind that cannot reach the others
are there too, and again afterwards.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from moedist.submit.task import hold_signals

SEEN_S = 10.0  # that a file may take to be seen on another node
ROUNDS = 5  # of the clocks' comparison
EXTRAS = ("deepspeed", "mpi4py", "wandb")
WANDB_HOST = ("api.wandb.ai", 443)


@dataclass
class RankSeen:
    """What one rank sees.

    Attributes:
        versions: of Python, torch and what it was built for, NCCL or RCCL, moedist and the extras that are there.
        devices: names of the accelerators that torch sees here.
        problem: why the ranks could not meet, or what failed together; None where all went well.
        skew_s: of this clock against rank 0's.
        sees: how many of the files that all ranks have written this one sees.
        sends_bytes_per_s, latency_s: of an exchange with all others.
    """

    rank: int
    size: int
    host: str
    kind: str
    versions: dict[str, str]
    devices: list[str]
    cores: int
    wandb_online: Optional[bool]  # None where the run would not be online
    data: Optional[str]  # what is wrong with the text's folder
    problem: Optional[str] = None
    met: bool = False
    mpi: str = ""
    skew_s: float = 0.0
    sees: int = 0
    sends_bytes_per_s: float = 0.0
    latency_s: float = 0.0


@dataclass
class CheckTask:
    """A check of all ranks of a job; submitit pickles it, and calls it on every rank."""

    config: str
    overrides: list[str] = field(default_factory=list)
    submitted: float = 0.0

    def __call__(self) -> None:
        hold_signals()
        from moedist.guard import guarded
        guarded(self._check)

    def _check(self) -> None:
        from moedist.config import load_config
        from moedist.world import World, find_launch
        config, launch = load_config(self.config, self.overrides), find_launch()
        facts = RankSeen(launch.rank, launch.size, socket.gethostname(), os.environ.get("MOEDIST_KIND", ""), _versions(),
                          _devices(), len(os.sched_getaffinity(0)), _reaches_wandb(config), _data_problem(config))
        _write(facts)
        try:
            with World.start(config.world) as world:
                facts.met = True
                _together(facts, config, world)
                _write(facts)
                world.barrier()
                if world.is_main:
                    (_folder().parent / "done").write_text("checked\n", encoding="utf-8")
        except Exception as error:
            facts.problem = " ".join(str(error).split())
            _write(facts)
            raise


def _together(facts: RankSeen, config: Any, world: Any) -> None:
    from moedist.mpi import mpi_version
    facts.mpi = mpi_version() if world.mpi is not None else ""
    facts.skew_s = _skew(world)
    world.barrier()
    deadline = time.monotonic() + SEEN_S
    while facts.sees < world.size and time.monotonic() < deadline:
        facts.sees = len(list(_folder().glob("*.json")))
        time.sleep(0.1)
    if world.size > 1:
        facts.sends_bytes_per_s, facts.latency_s = _links(config, world)


def _links(config: Any, world: Any) -> tuple[float, float]:
    """Bytes per second that this rank sends to all others, and seconds of an exchange of next to nothing.

    Raises:
        WorldError: a link changes bytes, or does not carry them; names it.
    """
    from moedist.coordinator.probe_links import measure_exchange
    from moedist.dispatch import build_transport
    from moedist.links import check_links
    from moedist.phases.run import weight_dtype
    transport = build_transport(world)
    check_links(world, transport)
    return measure_exchange(world, transport, config.model.width, weight_dtype(config))


def _skew(world: Any) -> float:
    """Seconds that this clock is ahead of rank 0's: the least over some rounds, which is nearest to how they stand."""
    found = []
    for _ in range(ROUNDS):
        world.barrier()
        now = time.time()
        found.append(now - world.broadcast_object(now))
    return min(found, key=abs)


def _versions() -> dict[str, str]:
    import torch
    versions = {"python": platform.python_version(), "torch": torch.__version__, "moedist": _version("moedist")}
    if torch.version.hip:
        versions["ROCm"] = torch.version.hip
    elif torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        versions["RCCL" if torch.version.hip else "NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {**versions, **{name: found for name in EXTRAS if (found := _version(name))}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> list[str]:
    import torch
    if not torch.accelerator.is_available():
        return []
    module = getattr(torch, torch.accelerator.current_accelerator().type)
    name = getattr(module, "get_device_name", lambda i: module.__name__)
    return [name(i) for i in range(torch.accelerator.device_count())]


def _reaches_wandb(config: Any) -> Optional[bool]:
    from moedist.monitor.recorder import wandb_mode
    if wandb_mode(config.monitor) != "online":
        return None
    try:
        socket.create_connection(WANDB_HOST, timeout=5).close()
    except OSError:
        return False
    return True


def _data_problem(config: Any) -> Optional[str]:
    if config.data.source != "files":
        return None
    from moedist.data import source_splits
    from moedist.errors import MoedistError
    try:
        source_splits(config.data)
    except MoedistError as error:
        return str(error)
    return None


def _folder() -> Path:
    return Path(os.environ["MOEDIST_JOB"]) / "check"


def _write(facts: RankSeen) -> None:
    folder = _folder()
    folder.mkdir(exist_ok=True)
    part = folder / f"{facts.rank}.part"
    part.write_text(json.dumps({**asdict(facts), "executable": sys.executable}), encoding="utf-8")
    part.replace(folder / f"{facts.rank}.json")
