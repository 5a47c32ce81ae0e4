"""Ranks of one life of a job meet over a store in which former lives have written; what is said where they do not."""

import re
import socket
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from moedist.errors import WorldError
from moedist.rendezvous.address import Address
from moedist.rendezvous.launch import Launch
from moedist.rendezvous.meeting import _come, _host, local_rank_of, meet
from tests.launching import QUICKSTART, ROOT, environment
from tests.ranks import free_port

HOST = socket.gethostname()


def meet_over(store, size: int) -> list[str]:
    """What each rank calls the life."""
    names = [""] * size
    others = [threading.Thread(target=lambda r=r: names.__setitem__(r, _come(store, r))) for r in range(1, size)]
    for thread in others:
        thread.start()
    names[0] = _host(store, size, 20)
    for thread in others:
        thread.join(20)
    return names


def test_every_life_has_its_own_name():
    store = dist.HashStore()
    names = [meet_over(store, size) for size in (3, 3, 2, 4)]
    assert all(len(set(life)) == 1 and life[0] for life in names)
    assert len({life[0] for life in names}) == len(names)


def test_a_former_life_is_not_taken_for_this_one():
    """Rank 1 of a former life came; rank 1 of this life does not, or comes late."""
    store = dist.HashStore()
    meet_over(store, 2)
    with pytest.raises(RuntimeError, match="rank 1 has not come"):
        _host(store, 2, 0.3)
    names = []
    late = threading.Timer(0.3, lambda: names.append(_come(store, 1)))
    late.start()
    names.append(_host(store, 2, 20))
    late.join(20)
    assert names[0] == names[1]


def errors_of_meeting(ranks, size, port, timeout_s=2) -> dict[int, WorldError]:
    """What these ranks of a world say, each in a thread, where they do not meet."""
    errors = {}

    def meet_or_say(rank):
        try:
            meet(Launch(rank, size, rank, "torchrun"), Address("127.0.0.1", port, "one host"), timeout_s)
        except WorldError as error:
            errors[rank] = error

    threads = [threading.Thread(target=meet_or_say, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def test_rank_0_names_who_is_missing_and_nobody_else_speaks():
    port = free_port()
    errors = errors_of_meeting([0, 1], 4, port)
    assert re.match(rf"ranks 2, 3 have not come to rank 0 on {HOST} at 127.0.0.1:{port} within 2 s; .*set MOEDIST_IFNAME",
                    str(errors[0]))
    assert errors[0].told_by == "rank" and errors[1].told_by == "other"


def test_an_unreachable_rank_0_is_named_once_by_every_host():
    port = free_port()
    errors = errors_of_meeting([1, 2], 3, port, timeout_s=0.5)
    assert re.match(rf"rank 1 on {HOST} could not reach 127.0.0.1:{port} \(one host\) within 0.5 s \(\[Errno .*set "
                    r"MOEDIST_IFNAME to an interface that leads there \(here: .*127.0.0.1", str(errors[1]))
    assert errors[1].told_by == "rank" and errors[2].told_by == "other"


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert f"cannot open port {port}" in str(errors_of_meeting([0], 2, port)[0])


def test_the_command_line_says_it_on_one_line(cache):
    port = free_port()
    done = subprocess.run([sys.executable, "-m", "moedist", "probe", *QUICKSTART, "world.rendezvous_timeout_s=1"], cwd=ROOT,
                          env={**environment(cache), "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"moedist: error: rank 1 on {HOST} could not reach 127.0.0.1:{port} .*\n", done.stderr), done.stderr


def test_local_ranks_are_counted_by_host(monkeypatch):
    store = dist.HashStore()
    for rank, host in enumerate(["a", "a", "b", "a", "b"]):
        store.set(f"host/{rank}", host)
    monkeypatch.setattr(socket, "gethostname", lambda: "a")
    assert [local_rank_of(store, r) for r in (0, 1, 3)] == [0, 1, 2]
    monkeypatch.setattr(socket, "gethostname", lambda: "b")
    assert [local_rank_of(store, r) for r in (2, 4)] == [0, 1]
