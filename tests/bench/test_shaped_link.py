"""Two namespaces joined by a link: as slow as asked for, and gone with the process that made them, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moedist.bench.shaped_link import ADDRESSES, ShapedLink, end_all, lacking
from moedist.faults import is_alive
from tests.launching import ROOT
from tests.ranks import needs

PATIENCE_S = 20
HOLD = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it would be ignored
from moedist.bench.shaped_link import ShapedLink
with ShapedLink() as link:
    link.shape(0, 1e8)
    rank = link.start(1, ["sleep", "1000"], 1, 2)
    print(rank.pid, *(holder.pid for holder in link._holders), flush=True)
    time.sleep(1000)
"""
RECEIVE = f"""
import socket, time
with socket.create_server(("{ADDRESSES[0]}", 5555)) as server:
    connection, got = server.accept()[0], 0
    start = time.monotonic()
    while part := connection.recv(1 << 20):
        got += len(part)
print(got, time.monotonic() - start)
"""
SEND = f"""
import socket, time
for _ in range(200):
    try:
        with socket.create_connection(("{ADDRESSES[0]}", 5555)) as connection:
            connection.sendall(bytes(4_000_000))
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
"""


@pytest.fixture(autouse=True)
def namespaces():
    needs(lacking())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_it(number):
    process = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, start_new_session=True)
    left = set(map(int, process.stdout.readline().split()))
    assert len(left) == 3 and all(map(is_alive, left))
    os.kill(process.pid, number)
    deadline = time.monotonic() + PATIENCE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = {pid for pid in left if is_alive(pid)}
    process.kill()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not left


def test_it_is_as_slow_as_it_is_asked_to_be():
    with ShapedLink() as link:
        link.shape(1, 1e8)
        receiver = link.start(0, [sys.executable, "-c", RECEIVE], 0, 2, stdout=subprocess.PIPE, text=True)
        assert end_all([receiver, link.start(1, [sys.executable, "-c", SEND], 1, 2)]) == 0
        got, seconds = receiver.communicate()[0].split()
    assert int(got) == 4_000_000 and float(seconds) > 0.25  # 0.32 at 12.5 MB/s, less what may go at once
