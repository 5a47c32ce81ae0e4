"""`moedist train`: put the parts of a run together and go through its phases."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence

from moedist.checkpoint import (DamagedCheckpoint, RunFolder, check_index, find_run, forms_of, load_checkpoint, mend, read_meta,
                                set_aside)
from moedist.config import Config, for_ranks, load_config, phases_override, to_yaml
from moedist.coordinator import start_plan, written_plan
from moedist.coordinator.facts import facts_to_json
from moedist.coordinator.probe_machine import host_name
from moedist.data import Corpus, EvalStream, TrainStream, prepare_corpus
from moedist.dispatch import build_transport, describe_ways
from moedist.engine import build_engine
from moedist.errors import CheckpointError, DataError
from moedist.links import check_links, link_test_wanted
from moedist.milestones import passed
from moedist.model import ExpertForm, Transformer
from moedist.monitor import Recorder, spoken
from moedist.phases import PHASES, Run, check_training
from moedist.phases.run import Progress, weight_dtype
from moedist.phases.train import Stopped, evaluate
from moedist.placement import Plan, split_batch
from moedist.routing import router_of
from moedist.world import World, find_launch

# What a run must share with the checkpoint it goes on from: with another value the weights or the position in the data
# would mean something else. Of the model, everything but these keys.
FIXED_ON_RESUME = ("router.name", "data.sequence_length", "data.tokenizer", "seed", "train.optimizer")
MODEL_MAY_CHANGE = ("dropout", "recompute", "init_std")


def train(config_path: str | None, overrides: Sequence[str] = (), resume: str | None = None) -> RunFolder:
    """Train a configuration, or go on with a run.

    Args:
        config_path: YAML file; may be None when a run folder is resumed.
        overrides: dotted overrides.
        resume: a run folder, "newest" for the newest run of this configuration's name, "auto" for that where there is one, or
            None to do what the configuration says, "auto" or "never".

    Returns:
        The run folder.
    """
    config, folder = _find_config(config_path, list(overrides), resume)
    size = find_launch().size
    meta = _newest_meta(folder) if folder else None
    config, dropped = for_ranks(config, size) if meta and meta["world_size"] != size else (config, [])
    check_training(config, size)
    written, notice = written_plan(config, size, meta)
    if dropped:
        notice = "; ".join([*([notice] if notice else []), f"left out, being for {meta['world_size']} ranks: {', '.join(dropped)}"])
    passed("imports")
    with World.start(config.world) as world:
        passed("until ranks had met")
        _say(config, world, notice)
        if link_test_wanted(world, config.world.link_test):
            check_links(world, build_transport(world), say=functools.partial(_say, config, world))
        run = resumed_run(config, world, folder) if folder else build_run(config, world, written)
        run.signals.listen()
        run.recorder.say(_describe(run))
        passed("for the model")
        try:
            for i in range(run.progress.phase, len(config.phases)):
                (name, value), = config.phases[i].items()
                PHASES[name](run, value)
                run.progress.phase, run.progress.phase_step = i + 1, 0
            if failure := run.finish_saving():
                raise CheckpointError(f"{failure}; free some space and go on with --resume {run.folder}")
            _finish(run)
        except Stopped:
            ranks = f"{program('torchrun')} --nproc-per-node {world.size} -m moedist" if world.size > 1 else program()
            run.recorder.say(f"stopped by a signal after step {run.progress.step}; go on with: "
                             f"{ranks} train --resume {run.folder}")
        finally:
            if world.size == 1:  # an error: of several ranks, the others may be gone
                run.finish_saving()
            run.recorder.close()
        return run.folder


def _find_config(path: str | None, overrides: list[str], resume: str | None) -> tuple[Config, RunFolder | None]:
    """The configuration, and the run to go on with, if any."""
    config = load_config(path, overrides) if path else RunFolder(resume or "").config(overrides)
    if resume is None:
        resume = "auto" if config.resume == "auto" else None
    if resume in ("newest", "auto"):
        try:
            folder = find_run(config.folder, config.name)
        except CheckpointError:
            if resume == "newest":
                raise
            return config, None  # a job that may be requeued has started for the first time
    elif resume is not None:
        folder = RunFolder(resume)
    else:
        return config, None
    refuse_other_model(folder.config(), config, folder)
    return config, folder


def _newest_meta(folder: RunFolder) -> dict[str, Any]:
    """The facts of the newest checkpoint that has them; which one can be read as a whole is seen later, by all ranks."""
    paths = folder.newest_first()
    for path in paths:
        try:
            return read_meta(path)
        except DamagedCheckpoint as error:
            last = error
    raise last


def resumed_run(config: Config, world: World, folder: RunFolder) -> Run:
    """A run that goes on from its newest checkpoint that is whole; others are told and set aside. Collective.

    Raises:
        CheckpointError: none is whole, or they are of another model.
    """
    if world.is_main:
        mend(folder)
    # rank 0's list: another machine may see a shared folder some seconds late
    paths = [Path(path) for path in world.broadcast_object([str(path) for path in folder.newest_first()])]
    damaged: list[str] = []
    for path in paths:
        try:
            check_index(path, world)
            meta = read_meta(path)
            run = build_run(config, world, written_plan(config, world.size, meta)[0], folder, path, meta)
        except DamagedCheckpoint as error:
            damaged.append(error.reason)
            if path != paths[-1]:
                _say(config, world, f"warning: {error.reason}; going on from the one before it")
            continue
        if world.is_main:
            for old in paths[:len(damaged)]:
                set_aside(old)
        return run
    raise CheckpointError(f"{folder} has no checkpoint that can be read: {'; '.join(damaged)}")


def refuse_other_model(saved: Config, config: Config, folder: RunFolder) -> None:
    """Raise `CheckpointError` where `config` differs from the saved one in what a checkpoint depends on."""
    model_keys = [f"model.{f.name}" for f in dataclasses.fields(config.model) if f.name not in MODEL_MAY_CHANGE]
    for name in (*model_keys, *FIXED_ON_RESUME):
        old, new = (functools.reduce(getattr, name.split("."), c) for c in (saved, config))
        if old != new:
            raise CheckpointError(f"{folder} was trained with {name}={old}, now it is {new}: its checkpoint does not fit; "
                                  f"set {name}={old}, or start without --resume")


def build_run(config: Config, world: World, written: Plan | None, folder: RunFolder | None = None,
              checkpoint: Path | None = None, meta: dict[str, Any] | None = None) -> Run:
    """All parts of a run, ready for its first phase.

    Args:
        written: the plan that the configuration writes down; None: measure the ranks.
        folder, checkpoint, meta: of the run that is resumed.

    Raises:
        WorldError: ranks hold different text or plans.
        CheckpointError: the checkpoint is of other text, or damaged.
        DataError: there is nothing to validate on.
    """
    say = functools.partial(_say, config, world)  # there is no recorder yet
    corpus = prepare_corpus(config.data)
    world.refuse_unequal("training text", corpus.digest, "check that data.path holds the same files everywhere")
    if meta and meta["corpus"] != corpus.digest:
        raise CheckpointError(f"{folder} was trained on other text (digest {meta['corpus'][:12]}, now "
                              f"{corpus.digest[:12]}); bring the old text back, or start without --resume")
    if corpus.valid is None:
        raise DataError("the text has no validation split; set data.valid_fraction above 0 to hold a part out")
    train_stream = TrainStream(corpus.train, config.data.sequence_length, config.seed)
    valid_stream = EvalStream(corpus.valid, config.data.sequence_length, config.train.eval_tokens)
    passed("for the text")
    transport, vocab = build_transport(world), corpus.tokenizer.vocab_size
    world.meter.begin(meta["progress"]["step"] if meta else 0)  # a declared slow-down is that of the step it goes on from
    forms = forms_of(checkpoint) if checkpoint else None
    if forms and meta:
        refuse_low_bits(checkpoint, forms, meta)
    plan, coordinator = start_plan(config, world, transport, vocab, written, meta, say, forms)
    passed("to measure and plan")
    model = Transformer(config, vocab, plan, transport, world.device, weight_dtype(config), world.meter, forms)
    engine = build_engine(model, config, world)
    progress = Progress()
    if checkpoint and meta:
        load_checkpoint(checkpoint, engine.named_tensors(), world)
        engine.loaded(meta["counters"])
        progress = Progress(**meta["progress"])
    folder = _open_folder(config, world, folder, corpus, progress.step)
    where = world.gather_objects(f"{host_name()}, {world.device}")
    recorder = Recorder(config, folder, world.rank, config.train_steps, progress.step, where)
    run = Run(config, world, folder, plan, coordinator, model, engine, train_stream, valid_stream, recorder, corpus.digest,
              progress)
    run.note_plan()
    if world.is_main and coordinator.facts:
        folder.ranks_file.write_text(facts_to_json(list(coordinator.facts)), encoding="utf-8")
    return run


def refuse_low_bits(checkpoint: Path, forms: Mapping[int, Mapping[int, ExpertForm]], meta: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a checkpoint's experts cannot be trained."""
    if any(form.is_lowbit for of_layer in forms.values() for form in of_layer.values()):
        source = meta.get("low_bits_of")
        raise CheckpointError(f"{checkpoint} holds experts in few bits, which are for evaluate and generate and cannot be "
                              f"trained or compressed; use the run that they were made of{f', {source}' if source else ''}")


def _open_folder(config: Config, world: World, folder: RunFolder | None, corpus: Corpus, step: int) -> RunFolder:
    """Rank 0 makes the run folder, or takes an old one back to `step`; the path is the same on every rank."""
    if world.is_main:
        if folder is None:
            folder = RunFolder.make(config.folder, config.name)
            corpus.tokenizer.save(folder.path)
        else:
            folder.forget_metrics_after(step)
        folder.config_file.write_text(to_yaml(config), encoding="utf-8")
        _tell_job("run", f"{folder.path.absolute()}\n")
    return RunFolder(world.broadcast_object(str(folder)))


def _say(config: Config, world: World, text: str | None) -> None:
    """A line for people, if there is one, while there is no recorder."""
    line = spoken(config.monitor.output, text) if text and world.is_main else None
    if line is not None:
        print(line, flush=True)


def _tell_job(name: str, text: str) -> None:
    """Leave a word for the job of Slurm that this run is of, and for its next life (`moedist.submit.life`)."""
    if job := os.environ.get("MOEDIST_JOB"):
        (Path(job) / name).write_text(text, encoding="utf-8")


def _describe(run: Run) -> str:
    world, model, config = run.world, run.model, run.config
    dense = run.engine.dense_size
    layers = [moe for _, moe in model.moe_layers()]
    mine = [sum(moe.bank.flops_per_row[moe.bank.expert_ids.index(e)] // 2 for moe in layers  # a weight, two operations
                for e in moe.dispatcher.layout.primary_experts),
            [len(moe.bank.expert_ids) for moe in layers], str(world.device), world.vendor]
    ranks = world.gather_objects(mine)
    in_experts = sum(r[0] for r in ranks)
    rows = config.model.pool_layers * router_of(config).expected_rows_per_token()
    active = dense + round(in_experts * rows / config.model.experts)
    counts = split_batch(run.coordinator.sizes.part, run.plan.batch_shares)
    lines = [f"run {run.folder}",
             f"{dense + in_experts:,} parameters, about {active:,} active per token; "
             f"{run.train_stream.sequences:,} training sequences of {config.data.sequence_length} tokens",
             f"{world.size} rank(s) by {world.launcher}; rows travel by {_way(world)} ({world.transport_why}); batch "
             f"{config.train.batch}"]
    lines += [f"  rank {i}: {device} ({vendor}), {_counted(held)} of {config.model.experts} experts in each of "
              f"{len(held)} layers, {count} of {sum(counts)} sequences"
              for i, ((_, held, device, vendor), count) in enumerate(zip(ranks, counts))]
    if world.size > 1 and layers:
        lines.append(f"  {describe_ways(layers[0].dispatcher, run.world.island_names)}")
    if not model.causal:
        lines.append(f"router {config.router.name} looks at later tokens of a sequence: its perplexity is optimistic")
    if run.progress.step:
        lines.append(f"resuming after step {run.progress.step}")
    return "\n".join(lines)


def _way(world: World) -> str:
    return world.transport if world.transport == world.carrier else f"{world.transport}, between them by {world.carrier}"


def _counted(numbers: list[int]) -> str:
    """'5' or '4 to 6'."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _finish(run: Run) -> None:
    nothing_to_do = run.held_out is None  # resumed when all was done
    if nothing_to_do:
        evaluate(run)
    result = run.held_out
    if run.world.is_main:
        _tell_job("done", f"{run.progress.step}\n")
    run.recorder.say(f"done: {run.progress.step} steps, validation loss {result.loss:.4f}, perplexity "
                     f"{result.perplexity:.2f} per token\nrun folder {run.folder}\nnext: {program()} generate {run.folder} "
                     f"--prompt \"def \"   or   {program()} evaluate {run.folder}   or   {program()} report {run.folder}"
                     + (f"\nall phases had been done; to train on: {train_on(run.folder)}" if nothing_to_do else ""))


def train_on(folder: RunFolder) -> str:
    """How the user trains a run on: what is left of its phases, or, where all are done, a tenth of its steps more."""
    phases, step = folder.config().phases, read_meta(folder.newest())["progress"]["step"]
    left = "train" in phases[-1] and sum(p.get("train", 0) for p in phases) > step
    more = "" if left else " " + shlex.quote(phases_override([*phases, {"train": max(1, step // 10)}]))
    return f"{program()} train --resume {folder}{more}"


def program(name: str = "moedist") -> str:
    """How the user starts a program of this Python's environment from here, active or not."""
    beside = Path(sys.executable).with_name(name)
    if not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)
