"""Models whose experts are outside the device: the same outputs, bit for bit, and only what is needed is moved."""

import pytest
import torch

from moedist.config import Config, DataConfig, LowBitConfig, ModelConfig, OffloadConfig
from moedist.coordinator import equal_plan
from moedist.decoding import Sampling, generate_batch
from moedist.dispatch import LocalTransport
from moedist.errors import CompressError
from moedist.model import Batch, Transformer
from moedist.offload import OffloadedBank, PieceId, offload
from moedist.phases.lowbit import low_banks, put_banks
from moedist.world import World
from tests.model.expert_forms import expert_of

GIB = 2**30
SIZES = ModelConfig(layers=3, width=32, heads=2, kv_heads=1, experts=6, top_k=2, expert_hidden=24)


def model_of(dtype: torch.dtype, top_n=None, low: bool = True) -> Transformer:
    config = Config(model=SIZES, data=DataConfig(sequence_length=16), lowbit=LowBitConfig(top_n))
    model = Transformer(config, 64, equal_plan(config, 1), LocalTransport(), torch.device("cpu"), dtype).eval()
    if low:
        experts = {(i, e): expert_of("low2", 24, 32, 4, seed=10 * i + e) for i in range(3) for e in range(6)}
        put_banks(model, low_banks(model, experts))
        for i, moe in model.moe_layers():
            moe.restored = config.restored(i)
    return model


@torch.no_grad()
def outputs(model: Transformer, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states of some batches, the last ones of one token as in generation."""
    found = []
    for i, (rows, length) in enumerate([(3, 16), (1, 16), (1, 3), (1, 1), (0, 4), (1, 2)]):
        ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(i))
        keys = torch.arange(rows * length).view(rows, length)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
            found.append(model(Batch(ids, keys, 0))[0])
    return found


@pytest.mark.parametrize("store, policy, prefetch", [("ram", "lru", 0), ("disk", "score", 2)])
@pytest.mark.parametrize("low, top_n", [(False, None), (True, None), (True, 1), (True, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_resident_experts(store, policy, prefetch, low, top_n, dtype, one_thread):
    wanted = outputs(model_of(torch.float32, top_n, low), dtype)
    model = model_of(torch.float32, top_n, low)
    probe = offload(model_of(torch.float32, top_n, low), OffloadConfig("ram"), dtype)
    share = 0.25 * probe.bytes_outside
    outside = offload(model, OffloadConfig(store, share / GIB, policy, prefetch), dtype)
    assert all(isinstance(bank, OffloadedBank) and not list(bank.parameters()) for bank in model.banks.values())
    for found, resident in zip(outputs(model, dtype), wanted):
        assert torch.equal(found, resident)
    outside.close()
    moved = outside.moved
    assert 0 < moved.peak <= int(share) == outside.cache.limit and moved.misses > 0
    assert moved.bytes > outside.bytes_outside / 3, "with a quarter of the room, experts came and went"
    assert (moved.ahead_bytes > 0) <= (prefetch > 0)
    compensators = [p for p in outside.cache.sizes if p.compensators]
    assert bool(compensators) == low
    if top_n == 0:
        assert not any(p in outside.cache for p in compensators), "none is used, none is fetched"
    assert "% hits" in outside.describe()


@pytest.mark.parametrize("low, top_n", [(False, None), (True, 1)])
def test_generation_with_a_cache_is_that_of_resident_experts(low, top_n, one_thread):
    """Keys and values are kept, experts come and go; sequences of several lengths."""
    prompts, sampling = [[5, 9, 33], [7], [1, 2, 3, 4, 5, 6]], Sampling(20, temperature=1.0, top_k=0)
    model = model_of(torch.float64 if not low else torch.float32, top_n, low)
    wanted = generate_batch(model, World(), prompts, sampling, context=16)
    assert wanted.timings.cached and wanted.ids == generate_batch(model, World(), prompts, sampling, context=16, cache=False).ids
    dtype = next(model.parameters()).dtype
    probe = offload(model_of(dtype, top_n, low), OffloadConfig("ram"), dtype)
    outside = offload(model, OffloadConfig("ram", 0.4 * probe.bytes_outside / GIB, "lru", 2), dtype)
    assert generate_batch(model, World(), prompts, sampling, context=16).ids == wanted.ids
    assert outside.moved.misses > 0
    outside.close()


@pytest.mark.parametrize("low", [False, True])
def test_with_several_threads_too(low):
    """Where the resident bank shares its work between threads, and where it does not."""
    assert torch.get_num_threads() == 2
    wanted = outputs(model_of(torch.float32, 1, low), torch.float32)
    model = model_of(torch.float32, 1, low)
    outside = offload(model, OffloadConfig("ram", 1.0), torch.float32)
    assert all(map(torch.equal, outputs(model, torch.float32), wanted))
    outside.close()


def test_a_cache_for_all_fetches_each_piece_once(one_thread):
    model = model_of(torch.float32, 1)
    outside = offload(model, OffloadConfig("ram", 1.0), torch.float32)
    outputs(model, torch.float32)
    outputs(model, torch.float32)
    assert outside.moved.bytes == outside.cache.used <= outside.bytes_outside
    assert PieceId(0, 0, False) in outside.cache


def test_what_is_read_ahead_is_what_the_next_layer_takes(one_thread):
    """The same hidden states and routers in all layers: then the guess is right."""
    model = model_of(torch.float32)
    layers = dict(model.moe_layers())
    for i in (1, 2):
        layers[i].router.load_state_dict(layers[0].router.state_dict())
    outside = offload(model, OffloadConfig("ram", 1.0, "lru", 2), torch.float32)
    seen = []
    read, outside.cache.read_ahead = outside.cache.read_ahead, lambda pieces: seen.extend(pieces)
    chosen = []
    layers[0].router.register_forward_hook(lambda _, __, found: chosen.append(sorted(found.expert_ids_N.tolist())))
    ids = torch.tensor([[7]])
    with torch.no_grad():
        model(Batch(ids, torch.zeros_like(ids), 0))
    assert [p.layer for p in seen] == [1, 1, 2, 2] and sorted(p.expert for p in seen[:2]) == chosen[0]
    read([])
    outside.close()


def test_refusals(one_thread):
    with pytest.raises(CompressError, match="does not hold the largest expert"):
        offload(model_of(torch.float32), OffloadConfig("ram", 1e-6), torch.float32)
    model = model_of(torch.float32, low=False)
    put_banks(model, low_banks(model, {(i, e): expert_of("two", 24, 32, 2, seed=e) for i in range(3) for e in range(6)}))
    with pytest.raises(CompressError, match="expert 0 of layer 0 is factored"):
        offload(model, OffloadConfig("ram", 1.0), torch.float32)
    model = model_of(torch.float32)
    offload(model, OffloadConfig("ram", 1.0), torch.float32)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(CompressError, match="no backward pass: train and watch them with offload.store=none"):
        model(Batch(ids, ids, 0))
    with pytest.raises(CompressError, match="is outside the device"):
        model.banks[0].blocks_of(0, ())
