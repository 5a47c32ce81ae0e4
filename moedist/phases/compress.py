"""The compress phase: smaller experts between two train phases, with their optimizer moments, and a plan for what they are now."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moedist.config import CompressConfig, Config, compress_config
from moedist.engine import replace_experts
from moedist.neurons.record import write_records
from moedist.phases.calibrate import Source
from moedist.phases.distill import distill
from moedist.phases.evaluation import held_out_loss
from moedist.phases.run import Run
from moedist.phases.shrink import Shrunk, method_of, shrink, summaries_json


def check_methods(config: Config) -> None:
    """Raise CompressError where a compress phase has options that its method has not, before anything is trained."""
    for phase in config.phases:
        if "compress" in phase:
            method_of(compress_config(phase["compress"]))


def compress_phase(run: Run, value: dict[str, Any]) -> None:
    """Compress the experts as `value` says, probe and plan again, evaluate, and write a checkpoint.

    Raises:
        CompressError: an impossible budget, or values that are not finite. The model is as it was.
    """
    c, start = compress_config(value), time.perf_counter()
    run.finish_saving()  # that of the step before must be there should the compression fail
    before = run.held_out.loss if run.held_out is not None else _evaluate(run).loss
    shrunk = compress_experts(run, c)
    run.recorder.say(_describe(run, shrunk, c, time.perf_counter() - start))
    run.experts_changed()
    result = run.held_out = _evaluate(run)
    run.evaluated_at = run.progress.step
    run.record({
        "compress/ratio": shrunk.ratio, "compress/bytes": sum(s.bytes for s in shrunk.summaries),
        "compress/seconds": time.perf_counter() - start, "valid/loss": result.loss, "valid/perplexity": result.perplexity,
    }, f"step {run.progress.step:>6}  valid loss {before:.4f} -> {result.loss:.4f}, perplexity {result.perplexity:.2f} after "
       "compression")
    if run.world.is_main:
        path = run.folder.compression_file(run.progress.step)
        if shrunk.records:
            write_records(run.folder.neurons_file(run.progress.step), shrunk.records)
        path.write_text(json.dumps(summaries_json(shrunk, c, run.progress.step), indent=1), encoding="utf-8")
        if run.recorder.shows_pictures:
            run.recorder.record_pictures(run.progress.step, _draw(run, shrunk, c.method))
    run.progress.phase, run.progress.phase_step = run.progress.phase + 1, 0  # a resumed run goes on behind this phase
    run.save(again=True)


def _draw(run: Run, shrunk: Shrunk, method: str) -> list[Path]:
    """Pictures of what was kept, in the run folder."""
    from moedist.neurons.facts import curve_of
    from moedist.neurons.pictures import draw_compression  # matplotlib takes a second
    step = run.progress.step
    curves = {key: {"curve": curve_of(step, record)} for key, record in shrunk.records.items()}
    experts = [{**asdict(s), **curves.get((s.layer, s.expert), {})} for s in shrunk.summaries]
    return draw_compression(experts, run.folder.path / "pictures" / f"compression-{step:08d}",
                            f"{run.folder.path.name}, {method} after step {step}")


def compress_experts(run: Run, c: CompressConfig) -> Shrunk:
    """Put smaller experts in place, with their moments, distilled where `c` wants it. Every rank must call it."""
    shrunk = shrink(run.model, run.world, source_of(run, c.tokens), c, run.recorder.bar)
    if c.distill_steps:
        passes = c.distill_steps * (run.config.train.batch // run.config.train.accumulate) * run.config.data.sequence_length
        first, last = distill(run, shrunk, c, source_of(run, passes))
        run.recorder.say(f"step {run.progress.step:>6}  distilled in {c.distill_steps} steps: mean squared difference to the "
                         f"experts before {first:.3g} -> {last:.3g}")
    else:
        replace_experts(run.engine, shrunk.compressed)
    return shrunk


def source_of(run: Run, tokens: int) -> Source:
    """The next `tokens` training tokens, at least one sequence, read in passes as large as those of training."""
    t, length = run.config.train, run.config.data.sequence_length
    return Source(run.train_stream, run.progress.sequences, max(1, -(-tokens // length)), t.batch // t.accumulate, run.dtype)


def _evaluate(run: Run):
    return held_out_loss(run.model, run.valid_stream, run.world, run.dtype, max(run.config.train.batch, run.world.size))


def _describe(run: Run, shrunk: Shrunk, c: CompressConfig, seconds: float) -> str:
    all_of = shrunk.summaries
    before, after = (sum(getattr(s, name) for s in all_of) / 2**20 for name in ("bytes_before", "bytes"))
    widths = sorted(s.hidden for s in all_of)
    return (f"step {run.progress.step:>6}  compressed {len(all_of)} experts by {c.method}: {before:.2f} -> {after:.2f} MiB, "
            f"{100 * shrunk.ratio:.1f} % removed; {widths[0]} to {widths[-1]} hidden neurons (median "
            f"{widths[len(widths) // 2]}, were {max(s.hidden_before for s in all_of)}); {seconds:.1f} s")
