"""The ranks of one life of a job meet.

torchrun restarts a job's processes beside the same key-value store, and torch reads there what the former life wrote: ranks
then call at addresses that nobody answers any more, and hang (pytorch/pytorch#135712, seen in 1 of 5 restarts on gloo with
torch 2.13). TORCHELASTIC_RESTART_COUNT does not tell lives apart: each node counts its own failures. So rank 0 names the life,
and answers each process by a word that only this process has said.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

POLL_S = 0.02


def meet(rank: int, size: int, timeout_s: float) -> tuple[Any, str]:
    """Wait for all ranks of this life, on all of them at the same time.

    Args:
        rank, size: this process among all; MASTER_ADDR and MASTER_PORT say where rank 0's store, or torchrun's, is.

    Returns:
        A store that holds nothing of former lives, and the name of this life.

    Raises:
        RuntimeError: not all have come within `timeout_s`.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout_s)))
    hall = dist.PrefixStore("moedist/meeting", store)
    life = _host(hall, size, timeout_s) if rank == 0 else _come(hall, rank)
    return dist.PrefixStore(f"moedist/{life}", store), life


def _come(hall: Any, rank: int) -> str:
    word = uuid.uuid4().hex
    hall.set(f"come/{rank}", word)
    life = hall.get(f"life/{word}").decode()
    hall.set(f"{life}/{rank}", "")
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
            raise RuntimeError(f"ranks {sorted(missing)} have not come")
        time.sleep(POLL_S)
    return life
