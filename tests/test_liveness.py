"""The process that sees ranks die: who was first, who is silent, and when it says nothing."""

import re
import socket
import subprocess
import sys
import threading
import time


from moedist import liveness
from moedist.liveness import Lifeline, Monitor, Peer


class Job:
    """A monitor in a thread of this process, and ranks that are connections to it."""

    def __init__(self, size: int = 4):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.said, self.told = self.server.getsockname()[1], [], []
        self.monitor = threading.Thread(target=Monitor(self.server, "life", size, self.said.append).run, daemon=True)
        self.monitor.start()

    def rank(self, number: int, life: str = "life") -> Lifeline:
        return Lifeline("127.0.0.1", self.port, life, number, Peer(f"host{number}", 100 + number),
                        lambda: self.told.append(number))

    def ends(self) -> list[str]:
        self.monitor.join(30)
        assert not self.monitor.is_alive()
        return self.said


def kill(rank: Lifeline) -> None:
    """As the system closes the connection of a process that is killed."""
    rank._socket.shutdown(socket.SHUT_RDWR)


def settle() -> None:
    time.sleep(0.3)


def test_the_first_to_die_is_named_and_the_others_are_told():
    job = Job(4)
    ranks = [job.rank(r) for r in range(4)]
    settle()
    kill(ranks[2])
    settle()
    assert sorted(job.told) == [0, 1, 3] and ranks[0].heard.is_set()
    for r in (0, 1, 3):
        kill(ranks[r])
    (line,) = job.ends()
    assert re.match(r"lost rank 2 on host2 \(process 102\): killed, .*--resume", line)


def test_deaths_that_are_seen_late_are_seen_in_their_order(monkeypatch):
    job = Job(4)
    ranks = [job.rank(r) for r in range(4)]
    settle()
    entered, go = threading.Event(), threading.Event()
    take = liveness._Rank.take
    monkeypatch.setattr(liveness._Rank, "take", lambda self: (entered.set(), go.wait(20), take(self))[2])
    ranks[1]._send(".")  # keeps the monitor busy while three ranks die
    assert entered.wait(20)
    for r in (3, 0, 2):
        kill(ranks[r])
    go.set()
    settle()
    kill(ranks[1])
    assert "lost rank 3 on" in job.ends()[0] and len(job.said) == 1


def test_ranks_that_end_well_are_not_missed():
    """One that ends before the next has come as well."""
    job = Job(3)
    for rank in range(3):
        job.rank(rank).done()
        settle()
    assert job.ends() == []


def test_who_has_spoken_needs_no_other_voice():
    job = Job(3)
    ranks = [job.rank(r) for r in range(3)]
    settle()
    ranks[1].spoken()
    settle()
    for rank in ranks:
        kill(rank)
    assert job.ends() == [] and job.told == []


def test_a_silent_rank_is_lost(monkeypatch):
    job = Job(3)
    monkeypatch.setattr(liveness, "SILENT_S", 4.0)
    monkeypatch.setattr(liveness, "END_S", 0.5)
    monkeypatch.setattr(liveness, "BEAT_S", 0.2)
    ranks = [job.rank(r) for r in range(3)]
    settle()
    ranks[1]._open = False  # no more beats over a connection that stands
    (line,) = job.ends()
    assert "lost rank 1 on host1" in line and "no answer" in line and sorted(job.told) == [0, 1, 2]
    ranks[0].done()


def test_strangers_are_not_missed():
    job = Job(1)
    rank = job.rank(0)
    job.rank(1, life="a former one")
    with socket.create_connection(("127.0.0.1", job.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    settle()
    rank.done()
    assert job.ends() == []


def test_it_is_a_program_that_needs_nothing_but_python():
    server = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen([sys.executable, "-I", "-S", liveness.__file__, str(server.fileno()), "life", "2"],
                               pass_fds=[server.fileno()], stderr=subprocess.PIPE, text=True)
    port = server.getsockname()[1]
    server.close()
    told = threading.Event()
    one, two = (Lifeline("127.0.0.1", port, "life", r, Peer("here", r), told.set) for r in (1, 2))
    settle()
    kill(one)
    assert told.wait(30)
    two.done()
    assert process.wait(30) == 0 and process.stderr.read().startswith("moedist: error: lost rank 1 on here (process 1)")
