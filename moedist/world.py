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
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Sequence

import torch
import torch.distributed as dist

from moedist.config import WorldConfig, number_islands
from moedist.errors import WorldError
from moedist.faults import start_watch, stop_watch
from moedist.islands import Islands
from moedist.liveness import Peer, start_liveness
from moedist.mpi import finish_mpi, mpi_version, start_mpi
from moedist.rendezvous.address import find_address
from moedist.rendezvous.interface import use_interface
from moedist.rendezvous.launch import MPI_LAUNCHERS, Launch, find_launch
from moedist.rendezvous.meeting import local_rank_of, meet
from moedist.timing import Meter, Throttle

NATIVE_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}


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
    return torch.device(kind, (launch.local_rank or 0) % torch.accelerator.device_count())


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


def _start_mpi(transport: str, launch: Launch) -> tuple[Any, str]:
    """An MPI communicator where MPI is asked for, or has started this process and may be of use; else None and why.

    Raises:
        WorldError: it is asked for and cannot be had.
    """
    if transport == "mpi":
        return start_mpi(launch.rank, launch.size, launch.launcher), ""
    if not launch.by_mpi:
        return None, f"started by {launch.launcher}"
    if transport == "torchdist" and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return None, "not asked for"
    try:
        return start_mpi(launch.rank, launch.size, launch.launcher), ""
    except WorldError as error:
        return None, str(error)


def _cores() -> frozenset[int]:
    """The cores that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def crowded_hosts(ranks: Sequence[tuple[str, frozenset[int]]]) -> tuple[str, ...]:
    """Hosts with more ranks than cores, from the host of every rank and the cores that it may run on.

    >>> crowded_hosts([("a", frozenset({0})), ("a", frozenset({1})), ("b", frozenset({0})), ("b", frozenset({0}))])
    ('b',)
    """
    count, cores = Counter(host for host, _ in ranks), defaultdict(set)
    for host, allowed in ranks:
        cores[host] |= allowed
    return tuple(host for host in count if count[host] > len(cores[host]))


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
    mpi: Any = None  # MPI communicator of all ranks, where MPI is up
    store: Any = None  # key-value store that the ranks have met at; None in a world of one
    transport: str = "local"  # what carries rows between ranks: local, torchdist, mpi or islands
    carrier: str = "local"  # the same; where islands do, what carries rows between islands
    transport_why: str = "one rank"  # why that carrier
    crowded: tuple[str, ...] = ()  # hosts with more ranks than cores
    timeout_s: float = 300.0  # of a collective
    islands: tuple[int, ...] = (0,)  # island of every rank: ranks that share a native collective library
    island_names: tuple[str, ...] = ("0",)  # the same as they are called: vendors, or what world.islands says
    groups: Islands | None = None  # process groups of the islands, where they carry rows
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def start(cls, config: WorldConfig = WorldConfig()) -> "World":
        """Find the launcher, pick the device, connect the ranks.

        Raises:
            WorldError: the ranks cannot meet, or the device is missing.
        """
        launch = find_launch()
        # before the ranks meet, where it can be: a device that is missing is told at once
        device = None if launch.local_rank is None else pick_device(config.device, launch)
        store, life, mpi, no_mpi = None, "", None, ""
        if launch.size > 1:
            interface = use_interface(config.interface)
            mpi, no_mpi = _start_mpi(config.transport, launch)
            store, life = meet(launch, find_address(launch, mpi, interface), config.rendezvous_timeout_s)
            if launch.local_rank is None:
                launch = replace(launch, local_rank=local_rank_of(store, launch.rank))
        device = device or pick_device(config.device, launch)
        if device.type == "cpu":
            keep_freed_memory()
        else:
            torch.accelerator.set_device_index(device.index or 0)
        slowdown = {step: factors[launch.rank] for step, factors in (config.slowdown or {}).items()}
        world = cls(launch.rank, launch.size, launch.local_rank, launch.launcher, device, mpi=mpi, store=store,
                    timeout_s=config.timeout_s, meter=Meter(Throttle(slowdown, device), device))
        if launch.size > 1:
            world._connect(config, life, no_mpi)
        return world

    def _connect(self, config: WorldConfig, life: str, no_mpi: str) -> None:
        timeout = timedelta(seconds=self.timeout_s)
        here = Peer.here()
        try:
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise WorldError(f"rank {self.rank} on {here.host} has met the others but cannot connect to all of them "
                             f"({str(error).splitlines()[0]}); set MOEDIST_IFNAME to an interface that all hosts "
                             "can reach each other by") from error
        self.control = dist.group.WORLD
        backend = NATIVE_BACKENDS.get(self.device.type)
        backend = backend if backend and dist.is_backend_available(backend) else None
        ranks = self.gather_objects((self.vendor, self.device.type, here, self.device.index, _cores(), backend))
        labels = [r[0] for r in ranks] if config.islands is None else config.islands
        self.islands, self.island_names = number_islands(labels), tuple(map(str, labels))
        one_vendor = len({r[:2] for r in ranks}) == 1
        devices = [(r[2].host, r[3]) for r in ranks]
        own_device = [devices.count(device) == 1 for device in devices]  # NCCL refuses two ranks on one GPU
        if one_vendor and all(own_device) and backend:
            self.native = dist.new_group(backend=backend, timeout=timeout)
        self.crowded = crowded_hosts([(r[2].host, r[4]) for r in ranks])
        several = len(set(self.islands)) > 1
        self._choose_carrier(config.transport, no_mpi, several)
        by_islands = config.transport == "islands" or (config.transport == "auto" and several)
        self.transport = "islands" if by_islands else self.carrier
        if by_islands and several:
            backends = [r[5] if own else None for r, own in zip(ranks, own_device)]
            self.groups = Islands.connect(self.islands, self.rank, backends, timeout)
        liveness = None
        if self.launcher in MPI_LAUNCHERS or self.mpi is not None:
            liveness = self.broadcast_object(start_liveness(life, self.size) if self.is_main else None)
        start_watch(self.rank, life, [r[2] for r in ranks], liveness)

    def _choose_carrier(self, wanted: str, no_mpi: str, several: bool) -> None:
        """torchdist or mpi, for rows between all ranks or, where there are `several` islands, between those; alike on all
        ranks. `no_mpi`: why MPI is not up, where it is not."""
        self.carrier, self.transport_why = wanted, "as configured"
        if wanted in ("torchdist", "mpi"):
            return
        self.carrier = "torchdist"
        if self.mpi is None:
            self.transport_why = no_mpi
        elif self.native is not None and not several:
            self.transport_why = "all ranks have accelerators of one vendor"
        elif self.crowded:
            self.transport_why = f"waiting MPI ranks spin, and there are more ranks than cores on {', '.join(self.crowded)}"
        else:
            self.carrier, self.transport_why = "mpi", f"{mpi_version()}, a core for every rank"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def vendor(self) -> str:
        return vendor_of(self.device)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # a rank that fails keeps its connections until it has said why: the others must not take it for dead before
        if self.size == 1 or kind is None or not issubclass(kind, Exception):
            self.close(all_ranks=kind is None)

    def close(self, all_ranks: bool = True) -> None:
        """End well. `all_ranks`: whether the others do so too; MPI's end waits for them."""
        stop_watch()
        if self.control is not None and dist.is_initialized():
            dist.destroy_process_group()
        if self.mpi is not None and all_ranks:
            finish_mpi()
        self.control = self.native = self.groups = self.mpi = self.store = None

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
