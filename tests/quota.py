"""A real CPU quota on a process, by a control group of its own; needs root and a file system that can be written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator

PERIOD_US = 20_000


def why_no_quota() -> str | None:
    """Why this process cannot limit another's processor time here; None where it can."""
    if os.geteuid():
        return "a CPU quota needs root"
    try:
        with cpu_quota(os.getpid(), 10.0):
            return None
    except OSError as error:
        return f"control groups cannot be written here: {error}"


@contextlib.contextmanager
def cpu_quota(pid: int, cores: float) -> Iterator[None]:
    """A process, with all its threads, gets so much processor time and no more.

    Raises:
        OSError: there are no control groups, or they cannot be written.
    """
    root, limit = _root()
    before, group = _group_of(pid, root), root / f"moedist-test-{os.getpid()}"
    group.mkdir()
    try:
        if limit == "cpu.max":
            (group / limit).write_text(f"{int(cores * PERIOD_US)} {PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / limit).write_text(str(int(cores * PERIOD_US)))
        try:
            (group / "cgroup.procs").write_text(str(pid))
            yield
        finally:
            (before / "cgroup.procs").write_text(str(pid))
    finally:
        group.rmdir()


def _root() -> tuple[Path, str]:
    """(folder that groups are made in, file that takes the quota) of control groups version 1 or 2."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(folder), "cpu.cfs_quota_us"
    for _, folder, kind, *_ in mounts:
        if kind == "cgroup2" and "cpu" in (Path(folder) / "cgroup.controllers").read_text(encoding="ascii").split():
            (Path(folder) / "cgroup.subtree_control").write_text("+cpu", encoding="ascii")
            return Path(folder), "cpu.max"
    raise OSError("no file system of control groups with a cpu controller is mounted")


def _group_of(pid: int, root: Path) -> Path:
    """The folder of the group that a process is in."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") or (not controllers and (root / "cgroup.controllers").exists()):
            return root / path.lstrip("/")
    raise OSError(f"process {pid} is in no group of {root}")
