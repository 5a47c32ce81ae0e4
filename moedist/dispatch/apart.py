"""Dispatch where every island has all experts: no row and no count leaves an island.

W ranks, E experts, P placements, as `moedist.dispatch.layout` has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

import torch

from moedist.dispatch.dispatcher import Experts, Loads
from moedist.dispatch.islands import IslandsTransport
from moedist.dispatch.layout import Layout

if TYPE_CHECKING:
    from moedist.dispatch.build import AnyDispatcher


class ApartDispatcher:
    """Moves the rows of one layer inside this rank's island. Everybody else sees the whole layer's `layout`.

    Args:
        layout: of all ranks, its plan with `islands`.
        transport: of the same islands.
        inside: makes the dispatcher of an island's ranks, from their layout and their transport.
        again: makes the dispatcher for another layout of all ranks.
    """

    def __init__(self, layout: Layout, transport: IslandsTransport, inside: Callable[[Layout, Any], Any],
                 again: Callable[[Layout], "AnyDispatcher"]):
        self.layout, self.transport = layout, transport
        self._inside, self._again = inside, again
        members = transport.members
        native = transport.native
        self.inner = inside(Layout(layout.plan.of_ranks(members), native.rank, native.world_size), native)
        first = layout.first_placement_W1
        self._members = torch.tensor(members)
        self._placements = torch.cat([torch.arange(first[r], first[r + 1]) for r in members])

    @property
    def plain(self) -> "ApartDispatcher":
        """See `Dispatcher.plain`."""
        return ApartDispatcher(self.layout, self.transport, lambda *of: self._inside(*of).plain, self._again)

    def for_layout(self, layout: Layout) -> "AnyDispatcher":
        """The same for another placement."""
        return self._again(layout)

    def run(self, x_TD: torch.Tensor, token_ids_N: torch.Tensor, expert_ids_N: torch.Tensor, weights_N: torch.Tensor,
            extra: torch.Tensor, experts: Experts,
            flags_N: torch.Tensor | None = None) -> tuple[Callable[[], torch.Tensor], Loads]:
        """See `Dispatcher.run`. The loads are those of this island; what the others did is 0 in them."""
        finish, loads = self.inner.run(x_TD, token_ids_N, expert_ids_N, weights_N, extra, experts, flags_N)
        ranks, placements = self.layout.world_size, len(self.layout.expert_P)

        def among_all(of_members: torch.Tensor) -> torch.Tensor:
            return of_members.new_zeros(ranks, *of_members.shape[1:]).index_copy_(0, self._members, of_members)

        rows_P = loads.rows_P.new_zeros(placements).index_copy_(0, self._placements, loads.rows_P)
        return finish, Loads(among_all(loads.load_WE), rows_P, self.layout.rows_of_ranks(rows_P), among_all(loads.extra_W))
