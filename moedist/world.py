"""The ranks of a job: who am I, on what device, and how do I talk to the others.

The world process group is gloo: control messages and CPU tensors. Where every rank has an accelerator of one vendor,
tensors travel over a second, native group (`nccl`, which NCCL and RCCL both answer to); otherwise they go through host
memory over gloo, so that GPU and CPU ranks can share a job. Ranks of several vendors form islands (`moedist.islands`), each
with a native group of its own. All that knows about vendors is in this file.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Mapping

import torch
import torch.distributed as dist

from moedist.config import WorldConfig
from moedist.errors import WorldError
from moedist.faults import Peer, start_watch, stop_watch
from moedist.islands import Islands, number_islands
from moedist.meeting import meet
from moedist.timing import Meter, Throttle

NATIVE_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


@dataclass(frozen=True)
class Launch:
    """Rank, size and local rank as the launcher's environment variables say."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def find_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's, MPI's or Slurm's variables, in this order; a lone process is a world of one.

    Raises:
        WorldError: a variable is not a number, or the rank is outside the world.
    """
    names = (("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
             ("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
             ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
             ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    for launcher, rank, size, local in names:
        # an interactive Slurm shell sets SLURM_NTASKS without starting tasks: a step is named by SLURM_STEP_ID
        if rank in env and size in env and (launcher != "slurm" or "SLURM_STEP_ID" in env):
            try:
                found = Launch(int(env[rank]), int(env[size]), int(env.get(local, env[rank])), launcher)
            except ValueError as error:
                raise WorldError(f"{rank}={env[rank]!r}, {size}={env[size]!r}: not whole numbers; "
                                 "start with torchrun, mpirun or srun") from error
            if not 0 <= found.rank < found.size:
                raise WorldError(f"{rank}={found.rank} is outside the world of {size}={found.size}; check the launcher")
            return found
    return Launch(0, 1, 0, "single process")


def pick_device(wanted: str, launch: Launch) -> torch.device:
    """The device of this rank: `wanted` is auto, cpu, a torch device, or a comma-separated list with one per rank.

    Raises:
        WorldError: the device is not there.
    """
    names = wanted.split(",")
    name = (names[launch.rank] if len(names) > 1 else names[0]).strip()
    present = torch.accelerator.is_available()
    if name == "cpu" or (name == "auto" and not present):
        return torch.device("cpu")
    if not present:
        raise WorldError(f"world.device asks for {name!r} on rank {launch.rank} but torch sees no accelerator here; "
                         "set world.device=cpu or install torch for your device")
    kind = torch.accelerator.current_accelerator().type
    if name not in ("auto", kind):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise WorldError(f"world.device {name!r} is not a torch device; use auto, cpu or {kind}") from error
        if device.type != kind:
            raise WorldError(f"world.device asks for {name!r} but the accelerator here is {kind!r}; use auto, cpu or {kind}")
        return device
    return torch.device(kind, launch.local_rank % torch.accelerator.device_count())


def vendor_of(device: torch.device) -> str:
    """nvidia, amd, intel, apple or cpu, from the torch build and the device type."""
    if device.type == "cuda":
        return "amd" if torch.version.hip else "nvidia"
    return {"xpu": "intel", "mps": "apple", "cpu": "cpu"}.get(device.type, device.type)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks: returning them each step costs up to a third of it in page faults on a CPU."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Ask glibc to give free blocks back to the system after all, such as before a measurement."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def leave_process() -> None:
    """End this rank with exit code 0, once all is closed and written, without C++'s clean-up.

    gloo's threads may outlive their group, and the clean-up of a process that still has one aborts it ("terminate called
    without an active exception", seen in 1 of 6 evaluations on three ranks with torch 2.13): a good run would end as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@dataclass
class World:
    """This rank among the others. Make one with `World.start`, end it with `close` (or use `with`)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "single process"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None  # gloo group; None in a world of one
    native: Any = None  # nccl/xccl group where all ranks share one vendor, else None
    islands: tuple[int, ...] = (0,)  # island of every rank: ranks that share a native collective library
    transport: str = "torchdist"  # who carries rows: torchdist, mpi or islands
    groups: Islands | None = None  # process groups of the islands, where they carry rows
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def start(cls, config: WorldConfig = WorldConfig()) -> "World":
        """Find the launcher, pick the device, connect the ranks.

        Raises:
            WorldError: the ranks cannot meet, or the device is missing.
        """
        launch = find_launch()
        device = pick_device(config.device, launch)
        if device.type == "cpu":
            keep_freed_memory()
        else:
            torch.accelerator.set_device_index(device.index or 0)
        slowdown = {step: factors[launch.rank] for step, factors in (config.slowdown or {}).items()}
        world = cls(launch.rank, launch.size, launch.local_rank, launch.launcher, device,
                    meter=Meter(Throttle(slowdown, device), device))
        if launch.size > 1:
            world._connect(config)
        return world

    def _connect(self, config: WorldConfig) -> None:
        timeout_s = config.timeout_s
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        timeout = timedelta(seconds=timeout_s)
        try:
            store, life = meet(self.rank, self.size, timeout_s)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise WorldError(f"rank {self.rank} of {self.size} could not reach the others at {where} within {timeout_s:g} "
                             f"s ({str(error).splitlines()[0]}); check MASTER_ADDR and the network") from error
        self.control = dist.group.WORLD
        here = Peer.here()
        backend = NATIVE_BACKENDS.get(self.device.type)
        backend = backend if backend and dist.is_backend_available(backend) else None
        vendors = self.gather_objects((self.vendor, self.device.type, here.host, self.device.index, here.pid, backend))
        self.islands = number_islands([v[0] for v in vendors] if config.islands is None else config.islands)
        one_vendor = len({v[:2] for v in vendors}) == 1
        devices = [v[2:4] for v in vendors]
        own_device = [devices.count(device) == 1 for device in devices]  # NCCL refuses two ranks on one GPU
        if one_vendor and all(own_device) and backend:
            self.native = dist.new_group(backend=backend, timeout=timeout)
        several = len(set(self.islands)) > 1
        self.transport = ("islands" if several else "torchdist") if config.transport == "auto" else config.transport
        if self.transport == "islands" and several:
            backends = [v[5] if own else None for v, own in zip(vendors, own_device)]
            self.groups = Islands.connect(self.islands, self.rank, backends, timeout)
        start_watch(self.rank, life, [Peer(v[2], v[4]) for v in vendors])

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def vendor(self) -> str:
        return vendor_of(self.device)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # a rank that fails keeps its connections until it has said why: the others must not take it for dead before
        if self.size == 1 or kind is None or not issubclass(kind, Exception):
            self.close()

    def close(self) -> None:
        stop_watch()
        if self.control is not None and dist.is_initialized():
            dist.destroy_process_group()
        self.control = self.native = self.groups = None

    def barrier(self) -> None:
        if self.size > 1:
            with self.meter.waiting():
                dist.barrier(group=self.control)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.meter.waiting():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_to_main(self, value: Any) -> list[Any]:
        """`value` of every rank, on rank 0; nothing elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        with self.meter.waiting():
            dist.gather_object(value, values if self.is_main else None, dst=0, group=self.control)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self.meter.waiting():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def refuse_unequal(self, what: str, digest: str, way_out: str) -> None:
        """Raise `WorldError` on every rank where the ranks hold different things."""
        digests = self.gather_objects(digest)
        other = [r for r, d in enumerate(digests) if d != digests[0]]
        if other:
            raise WorldError(f"ranks {other} have another {what} than rank 0 ({digests[other[0]][:12]} and "
                             f"{digests[0][:12]}); {way_out}")

    def sum_gradients_(self, flat: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous 1-D tensor over all ranks, in place; by islands where they have groups. Equal on all ranks."""
        if self.groups is None:
            return self.all_reduce_(flat)
        if flat.device.type != "cpu":
            torch.accelerator.synchronize(flat.device)  # what is still computed there is no waiting for others
        with self.meter.waiting():
            return self.groups.sum_(flat)

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce a contiguous tensor over all ranks, in place; staged through host memory where no native group is."""
        if self.size == 1:
            return tensor
        reduce_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        native = tensor.device.type != "cpu" and self.native is not None
        moved = tensor if native else tensor.cpu()  # before the wait: it drains the accelerator's queue
        with self.meter.waiting():
            dist.all_reduce(moved, reduce_op, group=self.native if native else self.control)
        return tensor if moved is tensor else tensor.copy_(moved)
