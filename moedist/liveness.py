"""A small process beside rank 0 that sees which rank dies first, and outlives them all to say so.

Where one process of a job is killed, mpirun at once kills the others: none of them lives to say which one it was. MPI itself
says nothing, and ranks that wait in it wait for ever. So every rank holds a connection to this process. The system closes it
when a rank ends, whatever way it ends, and closings are seen in the order in which they happen. A rank that sends nothing for
a while although its connection stands has lost its machine or its network, or is stopped.

Lines from a rank: `here` with who it is, `.` now and then, `done` when it ends as it should, `spoken` when it, or another, has
said why the job ends. To all ranks: `lost`, when this process has said it.

It is started as a program of its own, with nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import platform
import selectors
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

BEAT_S = 2.0
SILENT_S = 30.0  # a rank may hold Python's lock for some seconds, in the middle of a large tokenizer
WAIT_FOR_RANKS_S = 120.0
POLL_S = 1.0
CONNECT_S = 10.0
END_S = 15.0  # that ranks have once the reason is known


class Peer(NamedTuple):
    """Where a rank is."""

    host: str
    pid: int

    @classmethod
    def here(cls) -> "Peer":
        return cls(platform.node(), os.getpid())


def obituary(ranks: Mapping[int, Peer], killed: bool) -> str:
    """What is said of ranks that are lost without a word of their own. `killed`: whether a process is known to be gone."""
    names = ", ".join(f"rank {r} on {peer.host} (process {peer.pid})" for r, peer in ranks.items())
    why = ("killed, or crashed without a word (out of memory?)" if killed else
           "no answer: it was killed, hangs, or its machine is down or cut off")
    return f"lost {names}: {why}; go on from the last checkpoint with --resume"


# -- in the ranks


def start_liveness(life: str, size: int) -> Optional[int]:
    """Start the process, for so many ranks of this life; its port, or None where it cannot be started."""
    try:
        with socket.create_server(("", 0), backlog=1024) as server:
            subprocess.Popen([sys.executable, "-I", __file__, str(server.fileno()), life, str(size)],
                             pass_fds=[server.fileno()],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            return server.getsockname()[1]
    except OSError:
        return None


class Lifeline:
    """This rank's connection to the process.

    Args:
        lost: called, in a thread, once the process has said that a rank is lost.

    Raises:
        OSError: there is no way to it.
    """

    def __init__(self, host: str, port: int, life: str, rank: int, peer: Peer, lost: Callable[[], None]):
        self._socket = socket.create_connection((host, port), timeout=CONNECT_S)
        self._socket.settimeout(None)
        self._sending, self._open = threading.Lock(), True
        self._lost = lost
        self.heard = threading.Event()  # that the process has spoken
        self._send("here " + json.dumps({"life": life, "rank": rank, "host": peer.host, "pid": peer.pid}))
        for run in (self._beat, self._listen):
            threading.Thread(target=run, daemon=True, name="lifeline").start()

    def done(self) -> None:
        """This rank ends as it should."""
        self._send("done")
        self._open = False

    def spoken(self) -> None:
        """Why the job ends has been said."""
        self._send("spoken")

    def _send(self, line: str) -> None:
        with self._sending:
            try:
                if self._open:
                    self._socket.sendall(line.encode() + b"\n")
            except OSError:  # the process is gone: the ranks go on without it
                self._open = False

    def _beat(self) -> None:
        while self._open:
            time.sleep(BEAT_S)
            self._send(".")

    def _listen(self) -> None:
        try:
            heard = self._socket.recv(64)
        except OSError:
            return
        if heard.startswith(b"lost"):
            self.heard.set()
            self._lost()


# -- the process


class _Rank:
    """A connection."""

    def __init__(self, connection: socket.socket):
        self.connection, self.number, self.peer = connection, -1, Peer("", 0)
        self.rest, self.seen = b"", time.monotonic()

    def take(self) -> Optional[list[str]]:
        """Whole lines that have come; None once the connection is closed."""
        try:
            data = self.connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            return None
        self.seen = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


class Monitor:
    """Waits until all ranks of a life are gone, and says so where one goes without a word."""

    def __init__(self, server: socket.socket, life: str, size: int, say: Callable[[str], None]):
        self._server, self._life, self._to_come, self._say = server, life, size, say
        self._ranks: set[_Rank] = set()
        self._end: Optional[float] = None
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the last rank is gone, or should be."""
        polled = time.monotonic()
        none_by = polled + WAIT_FOR_RANKS_S
        while (self._ranks or (self._to_come > 0 and polled < none_by)) and polled < (self._end or float("inf")):
            events = self._selector.select(POLL_S)  # in the order in which they happened, where the system has epoll
            now = time.monotonic()
            for key, _ in events:
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.data)
            if now - polled > 5 * POLL_S:  # this process was stopped: so may all the others have been
                for rank in self._ranks:
                    rank.seen = now
            polled = now
            silent = sorted((r for r in self._ranks if r.number >= 0 and now - r.seen > SILENT_S), key=lambda r: r.number)
            if silent:
                self._tell(silent, killed=False)

    def _accept(self) -> None:
        rank = _Rank(self._server.accept()[0])
        self._ranks.add(rank)
        self._selector.register(rank.connection, selectors.EVENT_READ, rank)

    def _hear(self, rank: _Rank) -> None:
        lines = rank.take()
        for line in lines or ():
            word, _, rest = line.partition(" ")
            if rank.number < 0:
                if not self._greet(rank, word, rest):
                    lines = None
                    break
            elif word == "spoken":
                self._close()
            elif word == "done":
                rank.number = -1
                lines = None
                break
        if lines is None:
            lost = rank.number >= 0
            self._forget(rank)
            if lost:
                self._tell([rank], killed=True)

    def _greet(self, rank: _Rank, word: str, rest: str) -> bool:
        try:
            who: dict[str, Any] = json.loads(rest)
            if word != "here" or who["life"] != self._life:
                return False
            rank.number, rank.peer = int(who["rank"]), Peer(str(who["host"]), int(who["pid"]))
        except (ValueError, KeyError, TypeError):
            return False
        self._to_come -= 1
        return True

    def _forget(self, rank: _Rank) -> None:
        self._ranks.discard(rank)
        self._selector.unregister(rank.connection)
        rank.connection.close()

    def _close(self) -> None:
        self._end = time.monotonic() + END_S

    def _tell(self, lost: list[_Rank], killed: bool) -> None:
        """Say it, once, and let all ranks end."""
        if self._end is not None:
            return
        self._close()
        self._say(obituary({r.number: r.peer for r in lost}, killed))
        for rank in self._ranks:
            try:
                rank.connection.sendall(b"lost\n")
            except OSError:
                pass


def main(arguments: Sequence[str]) -> None:
    """Watch over the ranks of a life that connect to an inherited socket."""
    descriptor, life, size = arguments
    Monitor(socket.socket(fileno=int(descriptor)), life, int(size),
            lambda text: print(f"moedist: error: {text}", file=sys.stderr, flush=True)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
