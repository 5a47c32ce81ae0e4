"""Put the experts of a run's checkpoint in few bits: a run of its own, to evaluate and generate with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any, Iterable, Sequence

import yaml

from moedist.checkpoint import RunFolder, read_meta, save_checkpoint
from moedist.compress import Beam, build_beam
from moedist.config import Config, LowBitConfig, check_config, for_ranks, to_yaml
from moedist.data import EvalStream, TrainStream, prepare_corpus
from moedist.errors import CompressError
from moedist.model import Transformer
from moedist.phases.calibrate import Calibrations, Source, watch_experts
from moedist.phases.evaluation import held_out_loss
from moedist.phases.lowbit import LowSummary, low_banks, lower_experts, put_banks, refuse_factored
from moedist.phases.restore import OpenedRun, open_run
from moedist.phases.run import DTYPES
from moedist.text_table import table
from moedist.world import World, find_launch

HALF = 2  # bytes of a number in 16 bits, that savings are told against


def beam_options(bits: int, budget: str | None, more: Iterable[str]) -> Beam:
    """Options from the command line.

    Args:
        budget: bits a weight (below 64), or bytes of all experts.
        more: KEY=VALUE, fields of `Beam`.

    Raises:
        CompressError: an unknown or impossible one.
    """
    given: dict[str, Any] = {"bits": bits}
    if budget is not None:
        try:
            number = float(budget)
        except ValueError as error:
            raise CompressError(f"--budget takes bits a weight, such as 3.6, or bytes, not {budget!r}") from error
        given |= {"budget": number} if number < 64 else {"bytes": int(number)}
    for text in more:
        if "=" not in text:
            raise CompressError(f"--option {text!r} has no '='; write it as NAME=VALUE, such as ranks=kurtosis")
        name, value = text.split("=", 1)
        given[name] = yaml.safe_load(value)
    return build_beam(**given)


def parse_top_n(text: str | None) -> int | list[int] | None:
    """`lowbit.top_n` from "1", "1,2,1,0", or None.

    Raises:
        CompressError: something else.
    """
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise CompressError("--top-n takes a number, or one for each layer with experts such as 1,2,1,0, not "
                            f"{text!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


def beam_run(run_folder: str, beam: Beam, top_n: int | list[int] | None = None, tokens: int = 65536,
             overrides: Sequence[str] = (), step: int | None = None, name: str | None = None) -> RunFolder:
    """Write a new run folder whose checkpoint holds experts in few bits, without optimizer state; say what they take.

    Args:
        top_n: `lowbit.top_n` of the new run.
        tokens: training tokens that the experts are watched on.
        step: the checkpoint to take (None: the newest).
        name: of the new run (None: that of the old and -beam).

    Raises:
        CheckpointError, ConfigError, CompressError.
    """
    old, size = RunFolder(run_folder), find_launch().size
    checkpoint = old.of_step(step)
    meta = read_meta(checkpoint)
    config, _ = for_ranks(old.config(list(overrides)), size)
    config = dataclasses.replace(config, name=name or f"{config.name}-beam", lowbit=LowBitConfig(top_n))
    check_config(config, size)
    with World.start(config.world) as world:
        opened = open_run(old, config, world, step)
        model = opened.model
        refuse_factored(model, world)
        calibrations = watched(model, world, config, beam, tokens)
        before = _perplexity(opened, world)
        compressed, summaries = lower_experts(model, world, calibrations, beam)
        put_banks(model, low_banks(model, compressed))
        for layer, moe in model.moe_layers():
            moe.restored = config.restored(layer)
        after = _perplexity(opened, world)
        folder = RunFolder(world.broadcast_object(str(RunFolder.make(config.folder, config.name)) if world.is_main else None))
        if world.is_main:
            opened.tokenizer.save(folder.path)
            folder.config_file.write_text(to_yaml(config), encoding="utf-8")
            for path in old.path.glob("compression-*"):
                shutil.copy(path, folder.path)
            told = {"step": opened.step, "beam": dataclasses.asdict(beam), "top_n": top_n,
                    "experts": [dataclasses.asdict(s) for s in summaries]}
            (folder.path / f"lowbit-{opened.step:08d}.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
            print(report(summaries, config), flush=True)
            if before is not None and after is not None:
                print(f"validation perplexity {before:.2f} -> {after:.2f}, {after / before:.4f} of it", flush=True)
        save_checkpoint(folder, opened.step, model.named_state(), {**meta, "low_bits_of": str(old)}, world, 1)
        return folder


def _perplexity(opened: OpenedRun, world: World) -> float | None:
    """On the validation tokens that training reads; None where the text has no such split."""
    config, valid = opened.config, prepare_corpus(opened.config.data).valid
    if valid is None:
        return None
    stream = EvalStream(valid, config.data.sequence_length, config.train.eval_tokens)
    return held_out_loss(opened.model, stream, world, DTYPES[config.train.dtype], max(config.train.batch, world.size)).perplexity


def watched(model: Transformer, world: World, config: Config, beam: Beam, tokens: int) -> Calibrations:
    """What the experts see of so many training tokens."""
    length = config.data.sequence_length
    source = Source(TrainStream(prepare_corpus(config.data).train, length, config.seed), 0, max(1, -(-tokens // length)),
                    max(config.train.batch // config.train.accumulate, world.size), DTYPES[config.train.dtype])
    return watch_experts(model, world, source, list(model.banks), beam.needs)


def whole_bytes(config: Config) -> int:
    """Bytes of all experts as the configuration has them, before any compression, in 16 bits."""
    m = config.model
    return len(config.moe_layers()) * m.experts * (3 if m.activation == "swiglu" else 2) * m.expert_hidden * m.width * HALF


def report(summaries: Sequence[LowSummary], config: Config) -> str:
    """A table by bits, and what all experts take of what they took in 16 bits before any compression."""
    rows = []
    for bits in sorted({s.bits for s in summaries}):
        some = [s for s in summaries if s.bits == bits]
        ranks = [r for s in some for r in s.rank.values()]
        rows.append([bits, len(some), f"{8 * _sum(some, 'bytes') / _sum(some, 'weights'):.3f}",
                     f"{sum(ranks) / len(ranks):.1f}", max(ranks), *(f"{100 * _sum(some, of) / len(some):.2f} %"
                                                                     for of in ("error", "restored_error"))])
    size, weights, whole = _sum(summaries, "bytes"), _sum(summaries, "weights"), whole_bytes(config)
    head = ["bits", "experts", "bits a weight in all", "mean rank", "largest", "error", "restored"]
    text = (f"{table(head, rows)}\n{len(summaries)} experts take {size / 2**20:.2f} MiB, compensators "
            f"{_sum(summaries, 'compensator_bytes') / 2**20:.2f} MiB of it: {8 * size / weights:.3f} bits a weight, "
            f"{100 * (1 - size / whole):.1f} % less than {whole / 2**20:.2f} MiB in 16 bits")
    if HALF * weights < 0.995 * whole:
        text += (f" (fewer weights: {100 * (1 - HALF * weights / whole):.1f} %, in few bits: "
                 f"{100 * (1 - size / HALF / weights):.1f} % of the rest)")
    return text


def _sum(summaries: Iterable[LowSummary], of: str) -> float:
    return sum(getattr(s, of) for s in summaries)
