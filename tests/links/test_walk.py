"""Links of real ranks: sound ones, over every transport, and transports that change bytes."""

import dataclasses
import time

import pytest
import torch

from moedist.dispatch import build_transport
from moedist.errors import WorldError
from moedist.links import Depth, check_links, choose_pairs, link_test_wanted, measure_links
from moedist.links.pattern import DTYPES, pattern, wrong_bytes
from moedist.world import World
from tests.moe_cases import on_islands
from tests.ranks import run_ranks

QUICK = Depth({2**12: 2, 2**14: 1}, rounds=2, dtypes=DTYPES)


class Flips:
    """Changes one bit of the `place`-th byte that `target` gets from `source` in exchanges of one dtype."""

    def __init__(self, transport, source, target, dtype, place):
        self.inner, self.source, self.target, self.dtype, self.place = transport, source, target, dtype, place

    def exchange(self, buffer, send, receive, out):
        self.inner.exchange(buffer, send, receive, out=out)
        if self.inner.rank == self.target and out.dtype == self.dtype and receive[self.source] * out.itemsize > self.place:
            out[sum(receive[:self.source]):].view(torch.uint8)[self.place] ^= 16


def test_patterns_differ_everywhere():
    seen = [pattern(s, t, 64, dtype).view(torch.uint8) for s in range(3) for t in range(3) for dtype in DTYPES]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    words = pattern(1, 0, 2**20, torch.int64)
    assert len(words.unique()) == len(words) and pattern(1, 0, 64, torch.bfloat16).shape == (32,)
    assert torch.equal(pattern(1, 0, 64, torch.int8), pattern(1, 0, 2**12, torch.int8)[:64])


def test_bytes_are_compared_bit_by_bit():
    nans = torch.tensor([float("nan")] * 4)
    assert wrong_bytes(nans.clone(), nans) == (0, 0)
    other = nans.clone()
    other.view(torch.uint8)[6:9] ^= 1
    assert wrong_bytes(other, nans) == (3, 6)


def measured(world, islands):
    world = on_islands(world, islands)
    facts = measure_links(world, build_transport(world), choose_pairs(world.islands, ["h"] * world.size, 10), QUICK)
    return [dataclasses.astuple(f) for f in facts]


@pytest.mark.parametrize("transport, islands", [("torchdist", ()), ("torchdist", (0, 1, 1)), ("mpi", ()), ("mpi", (0, 0, 1))],
                         ids=str)
def test_sound_links(transport, islands):
    found = run_ranks(3, measured, islands, transport=transport)
    assert found[0] == found[1] == found[2] and len(found[0]) == 6
    for _, _, _, _, seconds, checked, wrong in found[0]:
        # at either size six dtypes once and bytes twice, timed; then all dtypes between all ranks
        assert not wrong and checked == 8 * (2**12 + 2**14) + 7 * 2**15
        assert {n: len(of) for n, of in seconds.items()} == {2**12: 2, 2**14: 2} and min(map(min, seconds.values())) > 0


def broken(world, islands, flips):
    world = on_islands(world, islands)
    try:
        check_links(world, Flips(build_transport(world), *flips))
    except WorldError as error:
        return str(error)


@pytest.mark.parametrize("islands, flips, words", [
    ((0, 0, 1), (0, 2, torch.uint8, 3), "(island 0) -> rank 2 on"),  # on a link that is timed
    ((0, 0, 1), (1, 0, torch.bfloat16, 9), "(bfloat16: 1 of 32,768, the first at byte 9)"),  # inside an island, one dtype
    ((), (2, 1, torch.int64, 4000), "(int64: 1 of 32,768, the first at byte 4,000)"),
], ids=str)
def test_a_link_that_changes_bytes_is_named_on_every_rank(islands, flips, words):
    texts = run_ranks(3, broken, islands, flips)
    assert len(set(texts)) == 1 and words in texts[0] and f"rank {flips[0]} on" in texts[0] and texts[0].count("->") == 1


def seconds_of_test(world, islands):
    world, start = on_islands(world, islands), time.process_time()
    facts = check_links(world, build_transport(world))
    return time.process_time() - start, [(f.source, f.target) for f in facts]


def test_the_short_test_is_short_and_is_of_links_between_islands(capfd):
    for seconds, links in run_ranks(4, seconds_of_test, (0, 0, 1, 1)):
        assert seconds < 1  # of the processor: others may have it meanwhile
        assert set(links) == {(a, b) for a in range(4) for b in range(4) if (a < 2) != (b < 2)}


def test_when_it_is_done():
    islands, plain, mpi = World(size=2, islands=(0, 1)), World(size=2, islands=(0, 0)), World(size=2, carrier="mpi")
    assert [link_test_wanted(w, "auto") for w in (World(), plain, islands, mpi)] == [False, False, True, True]
    assert link_test_wanted(plain, True) and not link_test_wanted(World(), True) and not link_test_wanted(islands, False)
