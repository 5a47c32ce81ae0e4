"""Two hosts on one machine, joined by a link as slow as is asked for: network namespaces, a veth pair, and tc.

Nothing of it outlives this process, however that ends: a namespace lasts as long as the processes in it, the one that holds
it ends when its standard input closes, and ranks are killed with their parent.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Optional, Sequence

from moedist.errors import MoedistError

TOOLS = ("ip", "tc", "unshare", "nsenter")
DEVICE = "link0"
PORT = 29500  # of rank 0's store: in a namespace of its own nothing else has it
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LEAST_BURST = 16 * 2**10  # bytes that may go at once; less than a millisecond's, and no rate is reached
READY_S, END_S = 5.0, 10.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)  # before any fork


def lacking() -> str:
    """Why there can be no such link here; empty where there can be one."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        with ShapedLink():
            return ""
    except MoedistError as error:
        return str(error)


class ShapedLink:
    """Two namespaces, numbered 0 and 1, while a `with` lasts. Needs root."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen] = []
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "ShapedLink":
        try:
            for _ in ADDRESSES:
                self._holders.append(subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE,
                                                      stdout=subprocess.DEVNULL))
            self._await_namespaces()
            first, second = (str(holder.pid) for holder in self._holders)
            _run("ip", "link", "add", DEVICE, "netns", first, "type", "veth", "peer", "name", DEVICE, "netns", second)
            for end, address in enumerate(ADDRESSES):
                self._inside(end, "ip", "link", "set", "lo", "up")
                self._inside(end, "ip", "addr", "add", f"{address}/24", "dev", DEVICE)
                self._inside(end, "ip", "link", "set", DEVICE, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def shape(self, end: int, bits_per_s: float, burst: Optional[int] = None) -> None:
        """What namespace `end` sends is as fast as this from now on.

        Args:
            burst: bytes that may go at once; packets that are larger never go.
        """
        burst = max(LEAST_BURST, int(bits_per_s / 8 / 1000)) if burst is None else burst
        self._inside(end, "tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", "rate", f"{int(bits_per_s)}bit", "burst",
                     str(burst), "latency", "50ms")

    def start(self, end: int, command: Sequence[str], rank: int, size: int, **options) -> subprocess.Popen:
        """Start a rank in namespace `end`; rank 0 is in namespace 0. `options` as for `Popen`."""
        environment = {**(options.pop("env", None) or os.environ), "RANK": str(rank), "WORLD_SIZE": str(size),
                       "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "MOEDIST_IFNAME": DEVICE}
        process = subprocess.Popen([*self._enter(end), *command], env=environment, preexec_fn=_die_with_parent, **options)
        self._processes.append(process)
        return process

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(END_S)
        for holder in self._holders:
            holder.stdin.close()
            try:
                holder.wait(END_S)
            except subprocess.TimeoutExpired:
                holder.kill()

    def _await_namespaces(self) -> None:
        mine, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + READY_S
        for holder in self._holders:
            while _namespace(holder.pid) in ("", mine):
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise MoedistError("no network namespace can be made here: unshare --net failed")
                time.sleep(0.01)

    def _enter(self, end: int) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holders[end].pid}/ns/net"]

    def _inside(self, end: int, *command: str) -> None:
        _run(*self._enter(end), *command)


def _die_with_parent() -> None:
    """In the child, before it becomes another program: SIGKILL when the parent is gone. Popen returns after it, so that there
    is no moment in which the child would stay."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MoedistError(f"{' '.join(command)} failed: {' '.join((done.stderr or done.stdout).split())}; this system cannot "
                           "make shaped links between network namespaces")


def end_all(processes: Sequence[subprocess.Popen]) -> int:
    """Wait for all; when one fails the others get SIGTERM. The first exit code that is not 0."""
    code = 0
    while any(p.poll() is None for p in processes):
        failed = [p.returncode for p in processes if p.poll()]
        if failed and not code:
            code = failed[0]
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    return code or next((p.returncode for p in processes if p.returncode), 0)
