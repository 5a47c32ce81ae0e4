"""Exchanges of rows by every transport: any dtype and shape, uneven and empty parts, several under way at once."""

import pytest
import torch

from moedist.dispatch import build_transport
from tests.ranks import run_ranks

TRANSPORTS = ("torchdist", "mpi")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int64, torch.bool)


def rows_of(source: int, target: int, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What `source` sends to `target`: other bits for every pair and place."""
    size = (count, *shape)
    generator = torch.Generator().manual_seed(100 * source + target)
    if dtype == torch.bool:
        return torch.randint(0, 2, size, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, size, generator=generator).to(dtype)


class Exchange:
    """One exchange of a rank, begun and not yet waited for; `counts[i][j]` rows go from i to j."""

    def __init__(self, transport, counts, shape, dtype, device="cpu"):
        r, ranks = transport.rank, range(transport.world_size)
        send, receive = [counts[r][j] for j in ranks], [counts[i][r] for i in ranks]
        self.sent = torch.cat([rows_of(r, j, send[j], shape, dtype) for j in ranks]).to(device)
        self.wanted = torch.cat([rows_of(i, r, receive[i], shape, dtype) for i in ranks])
        self.out = torch.empty(self.wanted.shape, dtype=dtype, device=device)
        self.pending = transport.start(self.sent, send, receive, self.out)

    def holds(self) -> bool:
        self.pending.wait()
        return torch.equal(self.out.cpu(), self.wanted)


def uneven(size: int, scale: int = 1) -> list[list[int]]:
    """Nothing to oneself, another number for every pair, nothing at all from the last rank."""
    return [[0 if i == j or i == size - 1 else scale * (1 + 2 * i + j) for j in range(size)] for i in range(size)]


def exchange_everything(world):
    transport = build_transport(world)
    found = {}
    for dtype in DTYPES:
        for shape in ((), (3,), (2, 5)):
            found[str(dtype), shape] = Exchange(transport, uneven(world.size), shape, dtype).holds()
    found["nothing"] = Exchange(transport, [[0] * world.size] * world.size, (4,), torch.float32).holds()
    found["rows of no width"] = Exchange(transport, uneven(world.size), (0,), torch.float32).holds()
    return found


def three_at_once(world, device="cpu"):
    transport = build_transport(world)
    found = []
    for scale in (1, 300, 7):  # larger, then smaller
        pending = [Exchange(transport, uneven(world.size, scale), (n,), torch.float32, device) for n in (16, 64, 1)]
        found += [exchange.holds() for exchange in pending]
    return found


def counts_of(world):
    return build_transport(world).all_gather_counts(torch.arange(4) + 10 * world.rank).tolist()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [2, 3])
def test_rows_arrive_bit_for_bit(size, transport):
    for found in run_ranks(size, exchange_everything, transport=transport):
        wrong = [name for name, right in found.items() if not right]
        assert not wrong and len(found) == 3 * len(DTYPES) + 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_several_exchanges_at_once(transport):
    for found in run_ranks(3, three_at_once, transport=transport):
        assert found == [True] * 9


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_counts(transport):
    assert run_ranks(3, counts_of, transport=transport) == [[[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_several_exchanges_at_once_of_an_accelerator(transport):
    kind = torch.accelerator.current_accelerator().type
    for found in run_ranks(2, three_at_once, kind, transport=transport):
        assert found == [True] * 9
