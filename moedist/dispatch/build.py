"""The transport and the dispatchers that a configuration asks for."""

from __future__ import annotations

from typing import Sequence, Union

import torch

from moedist.config import DispatchConfig
from moedist.dispatch.apart import ApartDispatcher
from moedist.dispatch.dedup import DedupDispatcher, Sharing
from moedist.dispatch.dispatcher import Dispatcher
from moedist.dispatch.exchange import Place
from moedist.dispatch.islands import IslandsTransport
from moedist.dispatch.layout import Layout
from moedist.dispatch.transport import GroupTransport, LocalTransport, TorchDistTransport, Transport
from moedist.errors import PlacementError
from moedist.world import World

AnyDispatcher = Union[Dispatcher, DedupDispatcher, ApartDispatcher]
WIRE_DTYPES = {None: None, "bfloat16": torch.bfloat16, "int8": torch.int8}


def build_transport(world: World) -> Transport:
    """The transport for this world: of islands where they have groups."""
    if world.size == 1:
        return LocalTransport()
    groups = world.groups
    carrier = _mpi(world) if world.carrier == "mpi" else None
    if groups is None:
        return carrier or TorchDistTransport(world)
    native = LocalTransport() if groups.own is None else GroupTransport(groups.own, world.meter, groups.native)
    return IslandsTransport(world.islands, native, carrier or GroupTransport(world.control, world.meter))


def _mpi(world: World) -> Transport:
    from moedist.dispatch.mpi_transport import MpiTransport  # needs mpi4py
    return MpiTransport(world)


def choose_sharing(config: DispatchConfig, transport: Transport, experts_per_token: float) -> Sharing:
    """The choices of `config`, `auto` decided: where ranks are in one island, rows go plainly; else once to an island where a
    token has several experts, and own rows are computed meanwhile."""
    several = len(set(getattr(transport, "islands", ()))) > 1
    dedup = config.dedup
    if dedup == "auto":
        dedup = "island" if several and experts_per_token > 1 else "none"
    overlap = config.overlap if config.overlap != "auto" else several or config.overlap_chunks > 1
    return Sharing(dedup, (WIRE_DTYPES[config.cross_dtype], WIRE_DTYPES[config.cross_dtype_backward]), overlap,
                   config.overlap_chunks)


def build_dispatcher(layout: Layout, transport: Transport, device: torch.device, sharing: Sharing = Sharing(),
                     place: Place | None = None) -> AnyDispatcher:
    """The plain dispatcher where nothing is shared, and rows all go one way; else one that shares. Where every island has all
    experts, one of those inside this rank's island.

    Raises:
        PlacementError: the plan keeps rows in other islands than the transport's.
    """
    if layout.plan.islands:
        if not isinstance(transport, IslandsTransport) or transport.islands != layout.plan.islands:
            raise PlacementError(f"the plan keeps rows in islands {list(layout.plan.islands)}, but rows travel in "
                                 f"{list(getattr(transport, 'islands', (0,) * transport.world_size))}; set world.islands and "
                                 "world.transport=islands as before, or placement.experts_in_every_island=false")
        # no row goes to another island; what is computed meanwhile is not worth a cut unless it is asked for
        here = Sharing("none" if sharing.dedup == "island" else sharing.dedup, overlap=sharing.pieces > 1,
                       pieces=sharing.pieces)
        return ApartDispatcher(layout, transport, lambda inside, native: build_dispatcher(inside, native, device, here, place),
                               lambda other: build_dispatcher(other, transport, device, sharing, place))
    if transport.world_size == 1 or sharing == Sharing() and not hasattr(transport, "islands"):
        return Dispatcher(layout, transport, device, place)
    return DedupDispatcher(layout, transport, device, sharing, place)


def describe_ways(dispatcher: AnyDispatcher, island_names: Sequence[str]) -> str:
    """How rows travel, in words; what `auto` has chosen among it. `island_names`: of every rank."""
    names = f"[{', '.join(island_names)}]"
    if isinstance(dispatcher, ApartDispatcher):
        return f"rows stay in islands {names}; inside, {describe_ways(dispatcher.inner, island_names)}"
    transport = dispatcher.transport
    sharing = dispatcher.sharing if isinstance(dispatcher, DedupDispatcher) else Sharing()
    islands = getattr(transport, "islands", (0,) * transport.world_size)
    words = [f"rows travel in islands {names}, natively inside and through host memory between"
             if len(set(islands)) > 1 else "rows travel in one island"]
    words.append({"none": "one for every token and expert", "rank": "one for every token and rank",
                  "island": "one for every token and island"}[sharing.dedup])
    for way, dtype in zip(("forward", "backward"), sharing.wire_dtype):
        if dtype is not None and len(set(islands)) > 1:
            words.append(f"{str(dtype).removeprefix('torch.')} between islands in the {way} pass")
    if sharing.overlap:
        words.append("own rows are computed meanwhile" + (f", in {sharing.pieces} pieces" if sharing.pieces > 1 else ""))
    return "; ".join(words)
