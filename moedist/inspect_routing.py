"""`moedist inspect --routing`: balance, local consistency and inter-layer affinity of routing, on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Sequence

import torch
from tqdm import tqdm

from moedist.checkpoint import RunFolder
from moedist.config import check_config, for_ranks
from moedist.data import EvalStream, prepare_corpus
from moedist.engine.forward import hidden_states
from moedist.errors import ConfigError, DataError
from moedist.model import Transformer
from moedist.phases.calibrate import Source
from moedist.phases.restore import open_run
from moedist.phases.run import DTYPES
from moedist.routing import Assignment, RouterInput
from moedist.traces.record import RoutingRecord, trace_of
from moedist.traces.report import report
from moedist.world import World, find_launch

SEGMENTS = (4, 16, 64)  # of the paper's 4, 16, 64 and 256, those that short sequences have


@dataclasses.dataclass(frozen=True)
class Look:
    """What to look at: layers (None: all), tokens of a segment (None: 4, 16 and 64, as far as sequences have them), experts
    that a cache holds (None: one, two and four times those of a token), validation tokens."""

    layers: Sequence[int] | None = None
    segments: Sequence[int] | None = None
    caches: Sequence[int] | None = None
    tokens: int = 16384


def inspect_routing(run_folder: str, look: Look = Look(), overrides: Sequence[str] = (), step: int | None = None,
                    json_path: str | None = None, pictures: str | None = None) -> str:
    """The tables as text; rank 0 writes everything as JSON, and the affinity of experts as a PNG beside it or in a folder of
    pictures, where a path is given.

    Counts are summed over ranks, so the result does not depend on how many there are, but for the rounding of shares.

    Raises:
        CheckpointError: no run or checkpoint there. DataError: no validation split. ConfigError: no such layer, no routing
            of tokens, or a segment longer than sequences.
    """
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), find_launch().size)
    check_config(config, find_launch().size)
    length, there = config.data.sequence_length, config.routed_layers()
    layers = there if look.layers is None else sorted(set(look.layers))
    if not there or set(layers) - set(there):
        raise ConfigError(f"layers with experts are {', '.join(map(str, there)) or 'none'}, not "
                          f"{', '.join(str(i) for i in layers if i not in there) or 'any'}; choose others")
    segments = [m for m in SEGMENTS if m <= length] if look.segments is None else sorted(set(look.segments))
    if max(segments, default=0) > length:
        raise ConfigError(f"a segment of {max(segments)} tokens is longer than sequences, of {length}; give shorter ones")
    with World.start(config.world) as world:
        opened = open_run(folder, config, world, step)
        valid = prepare_corpus(config.data).valid
        if valid is None:
            raise DataError(f"the text of {folder} has no validation split to look at; set data.valid_fraction")
        tokens = max(min(look.tokens, len(valid) - 1) // length, 1) * length  # whole sequences where there is one
        stream = EvalStream(valid, length, tokens)
        source = Source(stream, 0, stream.sequences, max(config.train.batch, world.size), DTYPES[config.train.dtype])
        record = record_routing(opened.model, world, source, layers, segments, look.caches)
        if not world.is_main:
            return ""
        found = {"run": str(folder), "step": opened.step, "router": config.router.name, **record.facts()}
    if json_path:
        Path(json_path).write_text(json.dumps(found, indent=1), encoding="utf-8")
    text = report(found)
    target = Path(pictures, "affinity.png") if pictures else Path(json_path).with_suffix(".png") if json_path else None
    if target and found["affinity"]:
        from moedist.traces.pictures import draw_affinity  # matplotlib
        text += f"\n\npicture {draw_affinity(found, target)}"
    return text


@torch.no_grad()
def record_routing(model: Transformer, world: World, source: Source, layers: Sequence[int], segments: Sequence[int] = SEGMENTS,
                   caches: Sequence[int] | None = None) -> RoutingRecord:
    """Counts of where the tokens of `source` go in these layers, the same on every rank. Collective.

    A token that a layer's router sends out several times in one pass is counted once for each expert.

    Args:
        caches: experts that a cache holds; None: one, two and four times `model.top_k`.

    Raises:
        ConfigError: a router sends mixtures of tokens.
    """
    routers = {i: moe.router for i, _, moe in model.routed_layers() if i in layers}
    most = max(router.experts for router in routers.values())
    wanted = caches or [times * model.m.top_k for times in (1, 2, 4)]
    record = RoutingRecord({i: router.experts for i, router in routers.items()}, segments,
                           sorted({min(size, most) for size in wanted}))
    traces: dict[int, torch.Tensor] = {}

    def note(layer: int, inputs: RouterInput, routed: Assignment) -> None:
        if routed.mix_in is not None:
            raise ConfigError("this router sends experts mixtures of tokens, so there is no routing of tokens to look at")
        g, s = inputs.vocab_ids_GS.shape
        trace = trace_of(routed, (g, s), routers[layer].experts)
        traces[layer] = traces[layer] | trace if layer in traces else trace
        if "entropy" in routed.stats:
            record.add_entropy(layer, float(routed.stats["entropy"]), g * s)

    hooks = [router.register_forward_hook(lambda _, inputs, routed, layer=i: note(layer, inputs[0], routed))
             for i, router in routers.items()]
    was_training = model.training
    model.eval()
    try:
        passes = -(-source.sequences // source.part)
        for batch, _ in tqdm(source.batches(model, world), total=passes, desc="inspect", unit="pass", leave=False,
                             disable=not world.is_main or None):
            hidden_states(model, batch.to(world.device), source.dtype)
            record.add(traces)
            traces.clear()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    record.sum_over(world)
    return record
