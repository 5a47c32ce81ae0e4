"""Carry tokens to the ranks that own their experts, and the results back.

`Dispatcher` does it in six phases; `transport` and `islands` move the bytes; `layout` says where everything goes; `segments`
holds the gathers and sums with exact gradients.
"""

from moedist.dispatch.dispatcher import Dispatcher, Meta
from moedist.dispatch.islands import IslandsTransport, build_transport
from moedist.dispatch.layout import Layout
from moedist.dispatch.transport import LocalTransport, Pending, TorchDistTransport, Transport

__all__ = ["Dispatcher", "IslandsTransport", "Layout", "LocalTransport", "Meta", "Pending", "TorchDistTransport", "Transport",
           "build_transport"]
