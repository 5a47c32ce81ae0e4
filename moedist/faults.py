"""When a rank fails, all end within seconds, and one line says which rank it was, on which host, and why.

A rank that fails by an error writes it into the job's key-value store before it goes. Every rank has a thread that looks
there once a second: where the main thread waits for a rank that is gone and nobody tells it (NCCL and MPI do not), it ends the
process. A rank that is killed writes nothing. The others are told by their sockets, and call the roll: who neither answers
nor, on the same machine, has a process is the one. Whoever comes first speaks for all. Under MPI, where they may be told
nothing or be killed as well, a process of its own sees who dies first, and speaks (`moedist.liveness`).

The store is that of torch.distributed, over a connection of its own: kept by torchrun, or by rank 0.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any, Optional, Sequence

from moedist.liveness import Lifeline, Peer, obituary
from moedist.mpi import end_process

LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting",
        "timeout caused pair closure", "remote process exited", "ncclRemoteError", "No route to host")
POLL_S = 1.0
ROLL_CALL_S = 5.0  # several polls, on a machine with more work than cores
SAME_HOST_S = 1.0  # ranks that die together do not die at the same moment
LINGER_S = 2.0
TOLD_S = 5.0  # from the moment that a rank is to speak until it has spoken
VERDICT_S = 3.0  # that the liveness process is given to see a closed connection
MPI_VERDICT_S = 0.5  # the same where the error may be MPI's, each of which has words of its own for a rank that is gone
GRACE_S = 15.0  # from a rank's failure until this one is ended, whatever it does
STORE_TIMEOUT_S = 5.0


class Watch:
    """This rank's ear to the failures of others, and its mouth.

    Args:
        life: the name that all have met under; peers: where every rank is; liveness: the port of the process beside rank 0
            that sees ranks die, None where there is none.
    """

    def __init__(self, rank: int, life: str, peers: Sequence[Peer], liveness: Optional[int] = None):
        import torch.distributed as dist
        self.rank, self.peers = rank, peers
        self._keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        host = "localhost" if self._keeps_store else os.environ["MASTER_ADDR"]
        store = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=STORE_TIMEOUT_S), wait_for_workers=False)
        self._store: Any = dist.PrefixStore(f"moedist/{life}/faults", store)
        self._stopped, self._answered, self._answering = threading.Event(), False, threading.Lock()
        self._lifeline: Optional[Lifeline] = None
        if liveness is not None:
            try:
                self._lifeline = Lifeline(host, liveness, life, rank, peers[rank], self._end)
            except OSError as error:
                print(f"warning: rank {rank} on {peers[rank].host} has no connection to the liveness process on rank 0's host "
                      f"(port {liveness}: {error}); where it is killed, nobody may say so", flush=True)
        threading.Thread(target=self._listen, daemon=True, name="faults").start()

    def stop(self) -> None:
        """This rank ends as it should: it is not missed."""
        self._stopped.set()
        if self._lifeline is not None:
            self._lifeline.done()
        try:
            self._answer()
            if self._keeps_store:
                self._await_all()
        except RuntimeError:  # the store has gone before, as it should
            pass

    def last_words(self, error: BaseException, text: str) -> str | None:
        """What this rank is to print before it ends, None where another rank speaks.

        Args:
            error: that this rank ends by; text: the same on one line, for people.
        """
        # torchrun ends the others as soon as one is gone: first let it be known why
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lifeline = self._lifeline
        if lifeline is not None and lifeline.heard.wait(VERDICT_S if is_lost_rank(error) else MPI_VERDICT_S):
            return None
        try:
            words = self._lost(text) if is_lost_rank(error) else self._own(text)
            if self._keeps_store:  # for the others to hear that somebody speaks
                time.sleep(LINGER_S)
            return words
        except RuntimeError:  # no store: it was with rank 0, and there is nobody to agree with on who speaks
            if not is_lost_rank(error):
                return self._named(text)
            here = self.peers[self.rank].host
            alive = [r for r, peer in enumerate(self.peers) if r and peer.host == here and is_alive(peer.pid)]
            if self.rank != min(alive, default=self.rank):
                return None
            time.sleep(LINGER_S)  # for those above to see that this one, which speaks, is alive
            return self._obituary([0])

    def spoken(self) -> None:
        """What `last_words` gave is printed: nobody needs to wait for it any more."""
        if self._lifeline is not None:
            self._lifeline.spoken()
        try:
            self._store.set("told", "")
        except RuntimeError:
            pass

    def _await_all(self) -> None:
        """Keep the store until all others need it no more: torch prints a stack trace where it is gone."""
        deadline = time.monotonic() + LINGER_S
        while self._store.add("here", 0) < len(self.peers) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _await_told(self) -> None:
        """Leave the rank that speaks its time: as soon as another has ended, mpirun ends it as well."""
        deadline = time.monotonic() + TOLD_S
        try:
            while not self._store.check(["told"]) and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:  # the store has gone with rank 0, which has spoken
            pass

    def _own(self, text: str) -> str | None:
        self._store.set(f"error/{self.rank}", text)
        if not self._speaks():
            self._await_told()
            return None
        deadline, errors = time.monotonic() + SAME_HOST_S, {}
        while len(errors) < len(self.peers) and time.monotonic() < deadline:
            time.sleep(0.05)
            errors.update({r: self._store.get(f"error/{r}").decode() for r in range(len(self.peers))
                           if r not in errors and self._store.check([f"error/{r}"])})
        everywhere = len(errors) == len(self.peers) and len(set(errors.values())) == 1
        return text if everywhere else self._named(text)

    def _lost(self, text: str) -> str | None:
        self._answer()
        self._store.add("failed", 1)
        start = time.monotonic()
        while (waited := time.monotonic() - start) < ROLL_CALL_S:
            time.sleep(0.1)
            if self._store.add("spoken", 0):
                self._await_told()
                return None
            gone = [r for r in range(len(self.peers)) if self._is_gone(r) and not self._has_answered(r)]
            if waited > SAME_HOST_S and gone and self._store.add("here", 0) + len(gone) >= len(self.peers):
                break
        silent = [r for r in range(len(self.peers)) if not self._has_answered(r)]
        if not self._speaks():  # not before: those who need not speak end
            self._await_told()
            return None
        return self._obituary(silent) if silent else self._named(f"{text}; all ranks answer")

    def _answer(self) -> None:
        with self._answering:
            if not self._answered:
                self._store.set(f"here/{self.rank}", "")
                self._store.add("here", 1)
                self._answered = True

    def _has_answered(self, rank: int) -> bool:
        return self._store.check([f"here/{rank}"])

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank is known to have no process any more: it can be, on this machine."""
        peer = self.peers[rank]
        return peer.host == self.peers[self.rank].host and not is_alive(peer.pid)

    def _speaks(self) -> bool:
        """Whether this rank is the first to say something; from now on all others end."""
        self._store.add("failed", 1)  # not after: the store may go with those who hear that this rank speaks
        return self._store.add("spoken", 1) == 1

    def _named(self, text: str) -> str:
        return f"rank {self.rank} on {self.peers[self.rank].host}: {text}"

    def _obituary(self, ranks: list[int]) -> str:
        return obituary({r: self.peers[r] for r in ranks}, any(map(self._is_gone, ranks)))

    def _end(self) -> None:
        """All has been said elsewhere."""
        if not self._stopped.is_set():
            end_process()

    def _listen(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                if not self._store.add("failed", 0):
                    continue
                self._answer()
            except RuntimeError:  # no store any more: sockets will tell the main thread
                return
            if not self._stopped.wait(GRACE_S):
                end_process()
            return


_watch: Watch | None = None


def start_watch(rank: int, life: str, peers: Sequence[Peer], liveness: Optional[int] = None) -> None:
    """Start to hear of other ranks' failures. Every rank must call it, after all have met (`moedist.rendezvous`)."""
    global _watch
    _watch = Watch(rank, life, peers, liveness)


def stop_watch() -> None:
    """This rank ends as it should."""
    global _watch
    if _watch is not None:
        _watch.stop()
    _watch = None


def current_watch() -> Watch | None:
    """The watch of this process, while it is one of several ranks."""
    return _watch


def is_lost_rank(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised in the handling of, is a collective's whose other side is gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and is not yet waited for does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
