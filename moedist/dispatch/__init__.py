"""Carry tokens to the ranks that own their experts, and the results back.

`Dispatcher` does it in six phases; `transport` moves the bytes; `layout` says where everything goes; `segments` holds the
gathers and sums with exact gradients.
"""

from moedist.dispatch.dispatcher import Dispatcher, Meta
from moedist.dispatch.layout import Layout
from moedist.dispatch.transport import LocalTransport, Pending, TorchDistTransport, Transport, build_transport

__all__ = ["Dispatcher", "Layout", "LocalTransport", "Meta", "Pending", "TorchDistTransport", "Transport", "build_transport"]
