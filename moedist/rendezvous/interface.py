"""The network interface that ranks talk over."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Optional

from moedist.errors import WorldError

VARIABLE = "MOEDIST_IFNAME"


def use_interface(configured: Optional[str]) -> Optional[str]:
    """Let gloo, NCCL and RCCL use the interface of MOEDIST_IFNAME, or else the configured one; None: theirs to choose.

    The variable comes first because interfaces may have other names on other hosts.

    Raises:
        WorldError: this host has no such interface, or it has no address.
    """
    name = os.environ.get(VARIABLE) or configured
    if not name:
        return None
    origin = VARIABLE if os.environ.get(VARIABLE) else "world.interface"
    here = interfaces()
    if name not in here:
        raise WorldError(f"{origin}={name}: {socket.gethostname()} has no such network interface; it has "
                         f"{', '.join(f'{n} ({a})' if a else n for n, a in here.items())}; set {VARIABLE} on each host, or "
                         "world.interface, to one of them", told_by="host")
    if here[name] is None and sys.platform == "linux":
        raise WorldError(f"{origin}={name}: this interface of {socket.gethostname()} has no IPv4 address; choose one of "
                         f"{', '.join(n for n, a in here.items() if a)}", told_by="host")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name  # RCCL reads NCCL's
    return name


def interfaces() -> dict[str, Optional[str]]:
    """IPv4 address of every network interface of this host by name; None where it has none, or cannot be asked."""
    return {name: address_of(name) for _, name in socket.if_nameindex()}


def address_of(name: str) -> Optional[str]:
    """The IPv4 address of an interface."""
    if sys.platform != "linux":
        return None
    import fcntl
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s.fileno(), siocgifaddr, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def own_address() -> str:
    """An address that other hosts most likely reach this one at: of its name, or of the interface of its default route."""
    try:
        found = socket.gethostbyname(socket.gethostname())
        if not found.startswith("127."):
            return found
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # nothing is sent; an address for documentation, which the default route leads to
            return s.getsockname()[0]
        except OSError:
            return "127.0.0.1"
