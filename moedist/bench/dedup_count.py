"""What sending a row once to an island saves, against the exact count for the routing that was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moedist.bench.split_islands import islands_of
from moedist.dispatch import Layout, Sharing, Transport, build_dispatcher
from moedist.errors import MoedistError
from moedist.placement import LayerPlan
from moedist.timing import Meter
from moedist.world import World

TOKENS, WIDTH, EXPERTS = 512, 256, 64
TRIPS = 4  # of a row: to the experts and back, and its gradient likewise


@dataclass(frozen=True)
class Saved:
    """Of all ranks, forward and backward, between islands."""

    top_k: int
    rows_plain: int
    rows: int
    bytes_plain: int
    bytes: int

    @property
    def saved(self) -> int:
        return self.bytes_plain - self.bytes


def measure_saved(world: World, transport: Transport, top_k: int) -> Saved:
    """Send drawn tokens through a layer's dispatch, every row by itself and then once to an island. Collective.

    Args:
        transport: over islands (`split_islands.islands_of`); expert e is on rank e mod W.

    Raises:
        MoedistError: other rows or bytes were saved than the routing says.
    """
    plain, shared = (_traffic(world, transport, top_k, dedup) for dedup in ("none", "island"))
    islands, far, once = islands_of(world.size), 0, 0
    for rank in range(world.size):
        _, experts_N = _routing(rank, top_k)
        island_TK = torch.tensor(islands)[experts_N % world.size].view(TOKENS, top_k)
        away_TK = island_TK != islands[rank]
        far += int(away_TK.sum())
        once += sum(int(((island_TK == island).any(1)).sum()) for island in set(islands) if island != islands[rank])
    found = Saved(top_k, plain[0], shared[0], plain[1], shared[1])
    wanted = (far, once, (far - once) * TRIPS * WIDTH * torch.float32.itemsize)
    if (found.rows_plain, found.rows, found.saved) != wanted:
        raise MoedistError(f"with {top_k} experts a token {found.rows_plain:,} rows went between islands by themselves and "
                           f"{found.rows:,} shared, {found.saved:,} bytes less, but the routing says {wanted[0]:,}, "
                           f"{wanted[1]:,} and {wanted[2]:,} bytes: dispatch counts or sends wrongly")
    return found


def _routing(rank: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, expert) of every pair of a rank: distinct experts for each token."""
    generator = torch.Generator().manual_seed(1000 * top_k + rank)
    experts_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(top_k).indices
    return torch.arange(TOKENS).repeat_interleave(top_k), experts_TK.flatten()


def _traffic(world: World, transport: Transport, top_k: int, dedup: str) -> tuple[int, int]:
    """Rows and bytes between islands, of all ranks."""
    meter = Meter()
    layout = Layout(LayerPlan.single([e % world.size for e in range(EXPERTS)]), world.rank, world.size)
    dispatcher = build_dispatcher(layout, transport, torch.device("cpu"), Sharing(dedup), (0, meter))
    token_N, expert_N = _routing(world.rank, top_k)
    x_TD, weights_N = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.rand(len(token_N), requires_grad=True)
    finish, _ = dispatcher.run(x_TD, token_N, expert_N, weights_N, torch.zeros(0, dtype=torch.int64), lambda rows, _: rows)
    finish().sum().backward()
    other = meter.traffic(0, "other")
    return tuple(map(sum, zip(*world.gather_objects((other.rows, other.bytes)))))
