"""What a rank runs on: host, device, memory. Without psutil, on Linux and macOS."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes."""

    free: int
    total: int


def host_name() -> str:
    return platform.node()


def device_name(device: torch.device) -> str:
    """What people call the device, such as NVIDIA H100 80GB HBM3 or the model of the processor."""
    if device.type == "cpu":
        return processor_name()
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name(device) if name else device.type


def processor_name() -> str:
    """The model of the processor, or what is known of it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model") and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


def device_memory(device: torch.device) -> Memory:
    """Of the device, all of it, however many ranks share it; of the machine for a CPU or where memory is shared with it."""
    query = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    return Memory(*query(device)) if query else host_memory()


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Of the machine, or of the control group that limits this process to less (a container, a Slurm job).

    Args:
        proc, cgroups: where the system shows itself.
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        kib = {key: int(value.split()[0]) for key, value in (line.split(":") for line in lines)}
        machine = Memory(1024 * kib["MemAvailable"], 1024 * kib["MemTotal"])
    except (OSError, KeyError):  # not Linux
        page, names = os.sysconf("SC_PAGE_SIZE"), os.sysconf_names
        total = page * os.sysconf("SC_PHYS_PAGES")
        machine = Memory(page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in names else total, total)
    for limited in _limits(proc, cgroups):
        machine = Memory(min(machine.free, limited.free), min(machine.total, limited.total))
    return machine


def _limits(proc: Path, cgroups: Path) -> list[Memory]:
    """What the control groups of this process, and those that these are in, leave it."""
    try:
        entries = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                         "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or "max": no limit here
                continue
            found.append(Memory(max(0, most - used + int(stat.get(cache, 0))), most))  # cached files give way
    return found
