"""The ranks of one life of a job meet.

torchrun restarts a job's processes beside the same key-value store, and torch reads there what the former life wrote: ranks
then call at addresses that nobody answers any more, and hang (pytorch/pytorch#135712, seen in 1 of 5 restarts on gloo with
torch 2.13). TORCHELASTIC_RESTART_COUNT does not tell lives apart: each node counts its own failures. So rank 0 names the life,
and answers each process by a word that only this process has said. All then wait for all, so that whoever is missing is
named once, by rank 0.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moedist.errors import WorldError
from moedist.rendezvous.address import Address
from moedist.rendezvous.interface import VARIABLE, interfaces
from moedist.rendezvous.launch import Launch

POLL_S = 0.02
CONNECT_S = 5.0  # of one try
LINGER_S = 1.0  # that rank 0 keeps its store, for the others to read that it speaks
ANSWER_S = 10.0  # that rank 0 may be late by
MISSING = "missing"


def meet(launch: Launch, address: Address, timeout_s: float) -> tuple[Any, str]:
    """Wait for all ranks of this life, on all of them at the same time.

    Returns:
        A store that holds nothing of former lives, and the name of this life.

    Raises:
        WorldError: rank 0's store, or torchrun's, is not at `address`, or not all have come within `timeout_s`.
    """
    try:
        store = _open_store(launch, address, timeout_s)
    except (RuntimeError, ValueError, OSError) as error:
        raise _unreachable(launch, address, timeout_s, error) from error
    hall = dist.PrefixStore("moedist/meeting", store)
    host = socket.gethostname()
    try:
        life = _host(hall, launch.size, timeout_s) if launch.rank == 0 else _come(hall, launch.rank)
    except _Missing as error:
        if launch.rank == 0:
            time.sleep(LINGER_S)
        raise WorldError(f"{error} to rank 0 on {host} at {address} within {timeout_s:g} s; look for what they say above, and "
                         f"set {VARIABLE} (interfaces here: {_interfaces()}) or world.rendezvous_timeout_s",
                         told_by="other" if launch.rank else "rank") from error
    except RuntimeError as error:
        raise WorldError(f"rank {launch.rank} on {host} reached {address} but rank 0 did not answer within "
                         f"{timeout_s + ANSWER_S:g} s ({_first_line(error)}); see whether rank 0 was started, and has not "
                         "failed") from error
    own = dist.PrefixStore(f"moedist/{life}", store)
    own.set(f"host/{launch.rank}", host)
    return own, life


def local_rank_of(store: Any, rank: int) -> int:
    """How many of the ranks before this one are on its host; for launchers that do not say it."""
    host = socket.gethostname()
    return sum(store.get(f"host/{r}").decode() == host for r in range(rank))


def _open_store(launch: Launch, address: Address, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.size, timeout=timeout))
    else:
        if launch.rank:
            timeout -= timedelta(seconds=_reach(address, timeout_s))
        # not by dist.rendezvous: its rank 0 waits for a number of connections, and cannot say who is missing
        store = dist.TCPStore(address.host if launch.rank else "localhost", address.port, launch.size,
                              is_master=launch.rank == 0, timeout=timeout, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=timeout_s + ANSWER_S))
    return store


def _reach(address: Address, timeout_s: float) -> float:
    """Seconds until rank 0 takes connections; torch's own tries print a stack trace each.

    Raises:
        OSError: it has not within `timeout_s`; the last try's.
    """
    start = time.monotonic()
    while True:
        try:
            socket.create_connection((address.host, address.port), timeout=CONNECT_S).close()
            return time.monotonic() - start
        except OSError:
            if time.monotonic() - start > timeout_s:
                raise
        time.sleep(POLL_S)


class _Missing(RuntimeError):
    """Ranks that have not come."""


def _come(hall: Any, rank: int) -> str:
    word = uuid.uuid4().hex
    hall.set(f"come/{rank}", word)
    life = hall.get(f"life/{word}").decode()
    hall.set(f"{life}/{rank}", "")
    if hall.get(f"{life}/all").decode() == MISSING:
        raise _Missing("others have not come")
    return life


def _host(hall: Any, size: int, timeout_s: float) -> str:
    life, missing = uuid.uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + timeout_s
    while missing:
        for rank in sorted(missing):
            if hall.check([f"{life}/{rank}"]):
                missing.remove(rank)
            elif hall.check([f"come/{rank}"]):  # of this life or a former one
                hall.set(f"life/{hall.get(f'come/{rank}').decode()}", life)
        if time.monotonic() > deadline:
            hall.set(f"{life}/all", MISSING)
            ranks = ", ".join(map(str, sorted(missing)))
            raise _Missing(f"rank {ranks} has not come" if len(missing) == 1 else f"ranks {ranks} have not come")
        time.sleep(POLL_S)
    hall.set(f"{life}/all", "")
    return life


def _unreachable(launch: Launch, address: Address, timeout_s: float, error: Exception) -> WorldError:
    host, text = socket.gethostname(), str(error)
    if launch.rank == 0 and ("EADDRINUSE" in text or "address already in use" in text.lower()):
        return WorldError(f"rank 0 on {host} cannot open port {address.port}: another program, perhaps another job, has it; "
                          "set MASTER_PORT to a free one on all ranks")
    # of the ranks of a host, which would all say the same, the first one that is not rank 0: it is there already
    first = launch.local_rank in (0, None) or launch.rank == launch.local_rank == 1
    return WorldError(f"rank {launch.rank} on {host} could not reach {address} ({address.origin}) within {timeout_s:g} s "
                      f"({_first_line(error)}); set {VARIABLE} to an interface that leads there (here: {_interfaces()}), or "
                      "see whether rank 0 runs there, MASTER_ADDR is right, and no firewall is between",
                      told_by="rank" if first else "other")


def _interfaces() -> str:
    return ", ".join(f"{name} {address}" for name, address in interfaces().items() if address) or "none with an address"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
