"""Experts in few bits in several ways side by side on one checkpoint: perplexity against bytes stored and moved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Sequence

from tqdm import tqdm

from moedist.bench.figures import write_figures
from moedist.checkpoint import RunFolder
from moedist.compress import Beam, build_beam
from moedist.compressing.low_bits import watched, whole_bytes
from moedist.compressing.sweep import parse_options
from moedist.config import check_config, for_ranks
from moedist.data import EvalStream, prepare_corpus
from moedist.errors import CompressError, DataError
from moedist.phases.calibrate import Calibrations
from moedist.phases.evaluation import held_out_loss
from moedist.phases.lowbit import Known, low_banks, lower_experts, put_banks, refuse_factored
from moedist.phases.moved import counting
from moedist.phases.restore import OpenedRun, open_run
from moedist.phases.run import DTYPES
from moedist.text_table import table
from moedist.world import World, find_launch

VARIANTS = ("bits=4", "bits=3", "bits=3+budget=3.75", "bits=3+budget=3.75+top_n=1", "bits=2", "bits=2+budget=2.75",
            "bits=2+budget=2.75+top_n=1")


@dataclass(frozen=True)
class LowPoint:
    """One way. `ppl_ratio` is over the checkpoint as it is; saved is a share of the uncompressed experts' bytes in 16 bits."""

    name: str
    perplexity: float
    ppl_ratio: float
    bits_per_weight: float
    saved: float
    moved: float


def low_variants(names: Sequence[str]) -> list[tuple[str, Beam, Any]]:
    """(name, options, top_n) of `bits=3+ranks=kurtosis+top_n=1`.

    Raises:
        CompressError: an unknown or impossible option.
    """
    found = []
    for text in names:
        options = parse_options(text.split("+"), text, "bits=2+budget=2.75")
        top_n = options.pop("top_n", None)
        found.append((text, build_beam(**options), top_n))
    return found


def low_bits_sweep(run_folder: str, names: Sequence[str] = VARIANTS, tokens: int = 65536, split: str = "valid",
                   eval_tokens: int | None = None, overrides: Sequence[str] = (), step: int | None = None,
                   json_path: str | None = None) -> list[LowPoint]:
    """Print a table, write figures `beam.{name}.ppl_ratio`, `.bits` and `.moved_bytes` to `json_path`.

    Args:
        names: see `low_variants`; "16bit" is the checkpoint as it is.
        tokens: training tokens that the experts are watched on; eval_tokens: of the split (None: as in training).

    Raises:
        CheckpointError, CompressError, DataError.
    """
    folder, size = RunFolder(run_folder), find_launch().size
    config, _ = for_ranks(folder.config(list(overrides)), size)
    check_config(config, size)
    chosen = low_variants(names)
    if not chosen:
        raise CompressError("--methods names no way to put experts in few bits; give some, such as bits=3,bits=2+budget=2.75")
    with World.start(config.world) as world:
        opened = open_run(folder, config, world, step)
        refuse_factored(opened.model, world)
        held_out = getattr(prepare_corpus(config.data), split)
        if held_out is None:
            raise DataError(f"the text of {folder} has no {split} split; use --split valid or train")
        stream = EvalStream(held_out, config.data.sequence_length, eval_tokens or config.train.eval_tokens)
        calibrations = watched(opened.model, world, config, chosen[0][1], tokens)
        base, moved = _evaluate(opened, world, stream)
        points, known = [], {}
        for name, beam, top_n in tqdm(chosen, unit="model", leave=False, disable=not world.is_main or None):
            points.append(_point(name, beam, top_n, opened, world, stream, calibrations, base, known))
        if world.is_main:
            print(f"{run_folder} step {opened.step}, {split} split: perplexity {base:.2f}; its experts' bytes for a token in "
                  f"16 bits: {moved / 1024:.1f} KiB")
            print(table(["experts", "bits a weight", "saved", "KiB a token", "perplexity", "over it"],
                        [[p.name, f"{p.bits_per_weight:.3f}", f"{100 * p.saved:.1f} %", f"{p.moved / 1024:.1f}",
                          f"{p.perplexity:.2f}", f"{p.ppl_ratio:.4f}"] for p in points]))
            write_figures({f"beam.{p.name}.{short}": getattr(p, field) for p in points for short, field in
                           (("ppl_ratio", "ppl_ratio"), ("bits", "bits_per_weight"), ("moved_bytes", "moved"))}, json_path)
        return points


def _point(name: str, beam: Beam, top_n: Any, opened: OpenedRun, world: World, stream: EvalStream,
           calibrations: Calibrations, base: float, known: Known) -> LowPoint:
    model, before = opened.model, dict(opened.model.banks)
    compressed, summaries = lower_experts(model, world, calibrations, beam, known)
    try:
        put_banks(model, low_banks(model, compressed))
        config = dataclasses.replace(opened.config, lowbit=dataclasses.replace(opened.config.lowbit, top_n=top_n))
        check_config(config, world.size)
        for layer, moe in model.moe_layers():
            moe.restored = config.restored(layer)
        perplexity, moved = _evaluate(opened, world, stream)
    finally:
        put_banks(model, before)
        for _, moe in model.moe_layers():
            moe.restored = None
    stored, weights = sum(s.bytes for s in summaries), sum(s.weights for s in summaries)
    return LowPoint(name, perplexity, perplexity / base, 8 * stored / weights, 1 - stored / whole_bytes(opened.config), moved)


def _evaluate(opened: OpenedRun, world: World, stream: EvalStream) -> tuple[float, float]:
    """(perplexity, bytes of experts a token)."""
    config = opened.config
    with counting(opened.model) as routed:
        found = held_out_loss(opened.model, stream, world, DTYPES[config.train.dtype], max(config.train.batch, world.size))
    return found.perplexity, routed.bytes_per_token(opened.model, world)
