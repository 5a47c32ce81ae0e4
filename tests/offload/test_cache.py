"""The cache: its limit at every moment, who is evicted, reading ahead, errors; a store that counts and one that fails."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moedist.errors import CompressError
from moedist.offload import Cache, DiskStore, PieceId, RamStore
from moedist.offload.store import Limit

CPU = torch.device("cpu")


def pieces(sizes: dict[PieceId, int]) -> dict[PieceId, torch.Tensor]:
    return {key: torch.full((size,), i % 251, dtype=torch.uint8) for i, (key, size) in enumerate(sizes.items())}


def ids(layers: int, experts: int, compensators: bool = False) -> list[PieceId]:
    kinds = (False, True) if compensators else (False,)
    return [PieceId(i, e, kind) for i in range(layers) for e in range(experts) for kind in kinds]


class Watched(RamStore):
    """A store that looks at the cache whenever it is read."""

    def read(self, piece: PieceId, out: torch.Tensor) -> None:
        held = sum(self.cache.sizes[p] for p in list(self.cache._entries))
        assert len(out) <= held <= self.cache.limit and self.cache.used <= self.cache.limit
        super().read(piece, out)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(["lru", "score"]), st.booleans())
def test_the_limit_holds_and_bytes_are_right(data, policy, ahead):
    keys = ids(2, 4, True)
    sizes = {key: data.draw(st.integers(1, 40)) for key in keys}
    largest = max(sizes[k] + sizes[k._replace(compensators=True)] for k in keys if not k.compensators)
    flats = pieces(sizes)
    store = Watched(flats, CPU)
    cache = store.cache = Cache(store, sizes, data.draw(st.integers(largest, largest + 80)), CPU, policy)
    moved = 0
    for _ in range(20):
        if ahead:
            cache.read_ahead(data.draw(st.lists(st.sampled_from(keys), max_size=3)))
        weights = data.draw(st.sampled_from([k for k in keys if not k.compensators]))
        wanted = [weights, weights._replace(compensators=True)][:data.draw(st.integers(1, 2))]
        cache.routed(weights.layer, {weights.expert: data.draw(st.floats(0, 1))})
        for key in wanted:
            moved += 0 if key in cache else sizes[key]
            assert torch.equal(cache.take(key), flats[key])
        for key in wanted:
            cache.give_back(key)
    cache.close()
    assert cache.moved.peak <= cache.limit
    if not ahead:
        assert cache.moved.bytes == moved and cache.moved.ahead_bytes == 0


def use(cache: Cache, *experts: int) -> None:
    for e in experts:
        cache.take(PieceId(0, e, False))
        cache.give_back(PieceId(0, e, False))


def held(cache: Cache) -> set[int]:
    return {p.expert for p in cache._entries}


def test_who_makes_room():
    sizes = dict.fromkeys(ids(1, 5), 10)
    lru, score = (Cache(RamStore(pieces(sizes), CPU), sizes, 30, CPU, policy) for policy in ("lru", "score"))
    for cache in (lru, score):
        cache.routed(0, {0: 0.5, 1: 0.9, 2: 0.1})
        use(cache, 0, 1, 2, 0, 3)
    assert held(lru) == {0, 2, 3}, "1 was used least recently"
    assert held(score) == {0, 1, 3}, "2 is wanted least"
    assert (lru.moved.hits, lru.moved.misses, lru.moved.bytes, lru.moved.peak) == (1, 4, 40, 30)
    assert lru.moved.hit_rate == 0.2


def test_what_is_used_stays_and_what_is_read_ahead_spares_it():
    sizes = dict.fromkeys(ids(3, 3), 10)
    cache = Cache(RamStore(pieces(sizes), CPU), sizes, 30, CPU)
    cache.take(PieceId(0, 0, False))
    use(cache, 1, 2)
    cache.read_ahead([PieceId(1, 0, False)])
    time.sleep(0.2)
    assert held(cache) == {0, 1, 2} and cache.moved.bytes == 30, "no room that this layer does not use"
    for e in range(2):  # now layer 1 computes: what layer 0 has left may go, but for what is still in use
        cache.take(PieceId(1, e, False))
    assert PieceId(0, 0, False) in cache and cache.used == 30
    cache.give_back(PieceId(0, 0, False))
    cache.read_ahead([PieceId(2, 1, False)])
    cache.close()
    assert PieceId(2, 1, False) in cache and PieceId(0, 0, False) not in cache
    assert cache.moved.ahead_bytes == 10
    hits = cache.moved.hits
    cache.take(PieceId(2, 1, False))
    assert cache.moved.hits == hits + 1


def test_a_piece_on_its_way_is_waited_for_not_read_twice():
    sizes = dict.fromkeys(ids(2, 2), 1000)
    cache = Cache(RamStore(pieces(sizes), CPU, limit=5000), sizes, 4000, CPU)  # 0.2 s a piece
    cache.read_ahead([PieceId(1, 0, False)])
    while PieceId(1, 0, False) not in cache:
        time.sleep(0.001)
    cache.take(PieceId(1, 0, False))
    assert cache.moved.bytes == 1000 and cache.moved.hits == 1 and 0.05 < cache.moved.stall_s
    cache.close()


def test_errors_come_to_the_one_who_computes():
    sizes = dict.fromkeys(ids(2, 2), 10)
    started = threading.Event()

    class Broken(RamStore):
        def read(self, piece, out):
            started.set()
            time.sleep(0.1)
            raise OSError("the disk is gone")

    cache = Cache(Broken(pieces(sizes), CPU), sizes, 40, CPU)
    with pytest.raises(OSError, match="the disk is gone"):
        cache.take(PieceId(0, 0, False))
    assert cache.used == 0
    started.clear()
    cache.read_ahead([PieceId(1, 1, False)])
    started.wait()
    with pytest.raises(CompressError, match="could not be read: the disk is gone"):
        cache.take(PieceId(1, 1, False))
    cache.close()


def test_a_cache_that_holds_no_expert_is_refused():
    sizes = {PieceId(0, 0, False): 100, PieceId(0, 0, True): 50}
    with pytest.raises(CompressError, match="a cache of 149 bytes does not hold the largest expert, 150 bytes"):
        Cache(RamStore(pieces(sizes), CPU), sizes, 149, CPU)


def test_disk_holds_what_ram_holds_and_limits_hold(tmp_path):
    sizes = {key: 16 * (i + 1) for i, key in enumerate(ids(2, 2, True))}
    flats = pieces(sizes)
    store = DiskStore(tmp_path / "experts.safetensors", flats)
    for key, flat in flats.items():
        out = torch.empty_like(flat)
        store.read(key, out)
        assert torch.equal(out, flat)
    start = time.perf_counter()
    with Limit(1e6).reading(100_000):
        pass
    assert time.perf_counter() - start >= 0.0999
