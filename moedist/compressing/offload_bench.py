"""`moedist bench offload`: a run's experts outside the device, in 16 and in few bits: bytes moved and tokens a second."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Mapping, Sequence

import torch

from moedist.bench.figures import write_figures
from moedist.checkpoint import RunFolder
from moedist.compress import Beam
from moedist.compressing.low_bits import watched
from moedist.compressing.low_bits_sweep import low_variants
from moedist.config import OffloadConfig, check_config, for_ranks
from moedist.data import EvalStream, prepare_corpus
from moedist.errors import ConfigError
from moedist.model import Bank, Batch, Transformer
from moedist.offload import Offloaded, offload
from moedist.offload.pieces import Piece, pieces_of
from moedist.phases.evaluation import EVAL_SEED
from moedist.phases.lowbit import Known, low_banks, lower_experts, put_banks, refuse_factored
from moedist.phases.restore import OpenedRun, open_run
from moedist.phases.run import DTYPES
from moedist.text_table import table
from moedist.world import World, find_launch

WHOLE = "16 bits"
VARIANTS = ("bits=3", "bits=3+budget=3.75", "bits=3+budget=3.75+top_n=1", "bits=2+budget=2.75+top_n=1")


@dataclass(frozen=True)
class Speed:
    """One way with one cache. `equal`: outputs are those of resident experts, bit for bit."""

    name: str
    share: float
    limit: int
    peak: int
    equal: bool
    bytes_per_token: float
    hit_rate: float
    stall: float
    tokens_per_s: float


def bench_offload(run_folder: str, names: Sequence[str] = VARIANTS, shares: Sequence[float] = (0.25,), tokens: int = 24,
                  context: int = 8, read_gib_s: float = 0.05, store: str = "disk", policy: str = "lru", prefetch: int = 2,
                  watch_tokens: int = 16384, rounds: int = 3, overrides: Sequence[str] = (), step: int | None = None,
                  json_path: str | None = None) -> list[Speed]:
    """Print a table; figures `offload.{name}.{share}.bytes_ratio` and `.speed_ratio`, over 16 bits, to `json_path`.

    Tokens are decoded greedily, the last `context` seen in each pass; first with experts on the device, then outside.

    Args:
        names: see `low_variants`; 16 bits come first.
        shares: of the bytes of all experts (as they are stored), that the cache may take.
        read_gib_s: declared limit of reading, in place of a disk whose pages are not cached.

    Raises:
        ConfigError: more than one rank.
    """
    if find_launch().size > 1:
        raise ConfigError(f"bench offload measures one device, and was started on {find_launch().size} ranks; start it on one")
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), 1)
    check_config(config, 1)
    chosen = low_variants(names)
    with World.start(config.world) as world:
        opened = open_run(folder, config, world, step)
        refuse_factored(opened.model, world)
        calibrations = watched(opened.model, world, config, Beam(), watch_tokens)
        stream = EvalStream(prepare_corpus(config.data).valid, config.data.sequence_length, None)
        prompt = stream.batch(0, 1)[0][0, :context].tolist()
        known, ways = Known(), {WHOLE: (dict(opened.model.banks), None)}
        for name, beam, top_n in chosen:
            ways[name] = low_banks(opened.model, lower_experts(opened.model, world, calibrations, beam, known)[0]), top_n
        resident: dict[str, list[torch.Tensor]] = {}
        rounds_of: dict[tuple[str, float], list[Speed]] = {}
        for _ in range(rounds):  # all ways in turn, so that what else the machine does meets all
            for name, (banks, top_n) in ways.items():
                _use(opened, banks, top_n)
                if name not in resident:
                    resident[name] = decode(opened, prompt, tokens, context)[0]
                for share in shares:
                    _use(opened, banks, top_n)
                    limit = share * _outside_bytes(opened.model, DTYPES[config.train.dtype]) / 2**30
                    c = OffloadConfig(store, limit, policy, prefetch, read_gib_s)
                    rounds_of.setdefault((name, share), []).append(
                        _measure(opened, name, share, c, prompt, tokens, context, resident[name]))
        print(f"{run_folder} step {opened.step}: {tokens} tokens decoded, {context} seen in each pass, median of {rounds} "
              f"rounds; {store} read at no more than {read_gib_s:g} GiB/s, {policy}, {prefetch} experts of the next layer read ahead")
        return _report([_median(of) for of in rounds_of.values()], json_path)


def _use(opened: OpenedRun, banks: Mapping[int, Bank], top_n: Any) -> None:
    put_banks(opened.model, banks)
    for layer, moe in opened.model.moe_layers():
        moe.restored = top_n[opened.config.moe_layers().index(layer)] if isinstance(top_n, list) else top_n


def _median(rounds: Sequence[Speed]) -> Speed:
    """Of the round in the middle by speed; most bytes held, and outputs, of all."""
    middle = sorted(rounds, key=lambda s: s.tokens_per_s)[len(rounds) // 2]
    return replace(middle, peak=max(s.peak for s in rounds), equal=all(s.equal for s in rounds))


def _measure(opened: OpenedRun, name: str, share: float, c: OffloadConfig, prompt: list[int], tokens: int, context: int,
             resident: list[torch.Tensor]) -> Speed:
    outside: Offloaded = offload(opened.model, c, DTYPES[opened.config.train.dtype])
    seen, seconds = decode(opened, prompt, tokens, context)
    outside.close()
    moved = outside.moved
    equal = len(seen) == len(resident) and all(map(torch.equal, seen, resident))
    return Speed(name, share, outside.cache.limit, moved.peak, equal, moved.bytes / tokens, moved.hit_rate,
                 moved.stall_s / seconds, tokens / seconds)


def _outside_bytes(model: Transformer, dtype: torch.dtype) -> int:
    return sum(Piece.of(tensors).bytes for bank in model.banks.values() for _, tensors in pieces_of(bank, dtype))


@torch.no_grad()
def decode(opened: OpenedRun, prompt: list[int], tokens: int, context: int) -> tuple[list[torch.Tensor], float]:
    """(last hidden state of every pass, seconds of all)."""
    model, dtype = opened.model, DTYPES[opened.config.train.dtype]
    device = next(model.parameters()).device
    ids, hidden_states, start = list(prompt), [], time.perf_counter()
    for _ in range(tokens):
        seen = torch.tensor([ids[-context:]], device=device)
        keys = torch.arange(seen.shape[1], device=device).unsqueeze(0)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            hidden, _ = model(Batch(seen, keys, EVAL_SEED))
        hidden_states.append(hidden[0, -1].clone())
        ids.append(int((hidden[0, -1] @ model.head_weight.to(hidden.dtype).t()).argmax()))
    return hidden_states, time.perf_counter() - start


def _report(found: list[Speed], json_path: str | None) -> list[Speed]:
    base = {s.share: s for s in found if s.name == WHOLE}
    rows: list[list[Any]] = []
    figures = {}
    for s in found:
        ratios = s.bytes_per_token / base[s.share].bytes_per_token, s.tokens_per_s / base[s.share].tokens_per_s
        rows.append([s.name, f"{100 * s.share:g} %", f"{s.limit / 1024:.0f}", f"{s.peak / 1024:.0f}",
                     "bit for bit" if s.equal else "NO", f"{s.bytes_per_token / 1024:.0f}", f"{ratios[0]:.3f}",
                     f"{100 * s.hit_rate:.0f} %", f"{100 * s.stall:.0f} %", f"{s.tokens_per_s:.2f}", f"{ratios[1]:.2f}"])
        figure = f"offload.{s.name}.{s.share:g}"
        figures |= {f"{figure}.bytes_ratio": ratios[0], f"{figure}.speed_ratio": ratios[1], f"{figure}.equal": float(s.equal)}
    print(table(["experts", "cache", "KiB", "most held", "outputs", "KiB moved a token", "of 16 bits", "hits", "stalled",
                 "tokens/s", "of 16 bits"], rows))
    write_figures(figures, json_path)
    return found
