"""Where the ranks meet: the address and port of rank 0's key-value store."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any, MutableMapping, Optional

from moedist.errors import WorldError
from moedist.rendezvous.interface import address_of, own_address
from moedist.rendezvous.launch import Launch
from moedist.rendezvous.slurm import first_node, job_port

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Address:
    """A host and port, and how they were found."""

    host: str
    port: int
    origin: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def find_address(launch: Launch, comm: Optional[Any] = None, interface: Optional[str] = None,
                 env: MutableMapping[str, str] = os.environ) -> Address:
    """MASTER_ADDR and MASTER_PORT where they are set, or else rank 0's by MPI broadcast or Slurm's variables; sets both.

    Args:
        comm: MPI communicator of all ranks, where MPI is up: then this call is collective.
        interface: that rank 0 is to be reached at (MPI only: Slurm names hosts).

    Raises:
        WorldError: nothing says where rank 0 is.
    """
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if port is not None and not (port.isdigit() and 0 < int(port) < 65536):
        raise WorldError(f"MASTER_PORT={port!r} is not a port; set a number from 1 to 65535, the same on all ranks",
                         told_by="host")
    origin = "MASTER_ADDR" if host else ""
    if not (host and port) and comm is not None:
        host, port, origin = _by_broadcast(launch.rank, comm, host, port, interface)
    if not host:
        host, origin = _by_variables(launch, env)
    if not port:
        port = str(job_port(env) or DEFAULT_PORT)
    env["MASTER_ADDR"], env["MASTER_PORT"] = host, port
    return Address(host, int(port), origin)


def _by_broadcast(rank: int, comm: Any, host: Optional[str], port: Optional[str],
                  interface: Optional[str]) -> tuple[str, str, str]:
    names = comm.allgather(socket.gethostname())
    found = None
    if rank == 0:
        mine = (interface and address_of(interface)) or ("127.0.0.1" if len(set(names)) == 1 else own_address())
        with socket.create_server(("", 0)) as free:
            found = (host or mine, port or str(free.getsockname()[1]), "rank 0 by MPI")
    return comm.bcast(found, root=0)


def _by_variables(launch: Launch, env: MutableMapping[str, str]) -> tuple[str, str]:
    if launch.launcher == "slurm" and (host := first_node(env)):
        return host, "Slurm's node list"
    local = next((int(env[name]) for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
                  if env.get(name, "").isdigit()), launch.size)
    if local < launch.size:
        raise WorldError(f"{launch.size} ranks on several hosts ({local} on this one), and nothing says where rank 0 is; set "
                         "MASTER_ADDR to its host on all ranks" + ("; with mpi4py installed MPI says it" if launch.by_mpi
                                                                   else ""), told_by="host")
    return "127.0.0.1", "one host"
