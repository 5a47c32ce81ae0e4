"""The network interface that ranks talk over."""

import os
import socket

import pytest

from moedist.errors import WorldError
from moedist.rendezvous.interface import interfaces, own_address, use_interface


def loopback() -> str:
    return next(name for name, address in interfaces().items() if address == "127.0.0.1")


@pytest.mark.skipif(not os.path.isdir("/sys/class/net"), reason="addresses of interfaces are read on Linux only")
def test_it_is_given_to_gloo_and_nccl_and_the_variable_comes_first(monkeypatch):
    assert use_interface(None) is None
    assert use_interface(loopback()) == loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == loopback()
    monkeypatch.setenv("MOEDIST_IFNAME", "ib7")
    with pytest.raises(WorldError, match=rf"MOEDIST_IFNAME=ib7: {socket.gethostname()} has no .*{loopback()} \(127.0.0.1\)"):
        use_interface(loopback())


def test_own_address_is_one():
    socket.inet_aton(own_address())
