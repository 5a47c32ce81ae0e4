"""Carry tokens to the ranks that own their experts, and the results back.

`Dispatcher` does it in six phases; `DedupDispatcher` sends a row once for several experts and overlaps; `transport` and
`islands` move the bytes; `layout` and `route` say where everything goes; `segments` holds the gathers and sums with exact
gradients.
"""

from moedist.dispatch.build import AnyDispatcher, build_dispatcher, build_transport, choose_sharing, describe_ways
from moedist.dispatch.dedup import DedupDispatcher, Sharing
from moedist.dispatch.dispatcher import Dispatcher, Meta
from moedist.dispatch.islands import IslandsTransport
from moedist.dispatch.layout import Layout
from moedist.dispatch.transport import GroupTransport, LocalTransport, Pending, TorchDistTransport, Transport

__all__ = ["AnyDispatcher", "DedupDispatcher", "Dispatcher", "GroupTransport", "IslandsTransport", "Layout", "LocalTransport",
           "Meta", "Pending", "Sharing", "TorchDistTransport", "Transport", "build_dispatcher", "build_transport",
           "choose_sharing", "describe_ways"]
