"""Groups of islands: numbers from names, sums over all of them, exchanges between and inside them."""

import pytest
import torch

from moedist.dispatch import IslandsTransport, build_transport
from moedist.config import number_islands
from tests.moe_cases import on_islands
from tests.ranks import run_ranks

SEVERAL = [(0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 1, 2), (0, 1, 0, 1)]


def test_names_number_islands():
    assert number_islands(["nvidia", "nvidia", "amd"]) == (0, 0, 1)
    assert number_islands([1, 0]) == (1, 0) and number_islands([7, "amd", "7"]) == (0, 1, 0)


def numbers_of(rank):
    return torch.randn(1001, generator=torch.Generator().manual_seed(rank))


def summed(world, islands):
    return on_islands(world, islands).sum_gradients_(numbers_of(world.rank))


@pytest.mark.parametrize("islands", SEVERAL, ids=str)
def test_sums_over_islands_are_equal_to_the_bit(islands):
    parts = run_ranks(4, summed, islands)
    assert all(torch.equal(part, parts[0]) for part in parts)
    torch.testing.assert_close(parts[0], sum(map(numbers_of, range(4))), rtol=1e-5, atol=1e-5)
    assert torch.equal(run_ranks(4, summed, islands)[0], parts[0]), "the same each time"


def exchanged(world, islands, dtype):
    """Whether every rank gets the rows that are for it, own ones too: those from s to r hold 10 s + r."""
    transport = build_transport(on_islands(world, islands))
    assert isinstance(transport, IslandsTransport) == bool(islands)
    rows_WW = torch.randint(0, 4, (4, 4), generator=torch.Generator().manual_seed(0))

    def of(s, r):
        return torch.full((int(rows_WW[s, r]), 3), 10 * s + r, dtype=dtype)

    buffer, wanted = (torch.cat(parts) for parts in ([of(world.rank, r) for r in range(4)],
                                                     [of(s, world.rank) for s in range(4)]))
    send, receive = rows_WW[world.rank].tolist(), rows_WW[:, world.rank].tolist()
    outs = [torch.empty_like(wanted) for _ in range(2)]
    under_way = [transport.start(buffer, send, receive, out) for out in outs]  # two at once
    for pending in under_way:
        pending.wait()
    return all(torch.equal(out, wanted) for out in outs)


@pytest.mark.parametrize("islands", [(), *SEVERAL], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64], ids=str)
def test_rows_of_any_dtype_are_exchanged(islands, dtype):
    assert all(run_ranks(4, exchanged, islands, dtype))
