"""`moedist inspect`: what CUR kept, what experts do neuron by neuron, and who routes where; on any number of ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from tqdm import tqdm

from moedist.checkpoint import RunFolder
from moedist.config import Config, check_config, for_ranks
from moedist.data import EvalStream, prepare_corpus
from moedist.errors import ConfigError, DataError
from moedist.model import MoELayer, Transformer
from moedist.neurons.facts import (Surroundings, Words, curve_facts, dropped_facts, expert_facts, neuron_facts, of_most_fisher,
                                   overlap_facts, overlaps, profile)
from moedist.neurons.record import Key, NeuronRecord, history, read_records
from moedist.neurons.report import report
from moedist.neurons.tokens import TopTokens
from moedist.phases.calibrate import Calibrations, Source, dense_expert, primaries_only, watch_experts, watching
from moedist.phases.evaluation import forward_loss
from moedist.phases.restore import open_run
from moedist.phases.run import DTYPES
from moedist.routing import Assignment
from moedist.world import World, find_launch


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to look at: layers (None: all), experts of which to tell neurons (None: all), neurons of each to tell all of."""

    layers: Sequence[int] | None = None
    experts: Sequence[int] | None = None
    top: int = 5
    tokens: int = 16384


def inspect_run(run_folder: str, choice: Choice = Choice(), overrides: Sequence[str] = (), step: int | None = None,
                json_path: str | None = None, pictures: str | None = None) -> str:
    """The tables as text; rank 0 writes everything as JSON, and pictures, where a path is given.

    Neurons are scored, and their tokens found, on the validation split, by the checkpoint's own experts.

    Raises:
        CheckpointError: no run or checkpoint there. DataError: no validation split. ConfigError: no such layer or expert.
    """
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), find_launch().size)
    check_config(config, find_launch().size)
    layers = _existing("layer with experts", choice.layers, config.moe_layers())
    experts = _existing("expert", choice.experts, range(config.model.experts))
    with World.start(config.world) as world:
        found = _findings(folder, config, world, dataclasses.replace(choice, layers=layers, experts=experts), step)
        if not world.is_main:
            return ""
        if json_path:
            Path(json_path).write_text(json.dumps(found, indent=1), encoding="utf-8")
        text = report(found, details=choice.layers is not None or choice.experts is not None, top=choice.top)
        if pictures:
            from moedist.neurons.pictures import draw  # matplotlib
            text += "\n\n" + "\n".join(f"picture {path}" for path in draw(found, Path(pictures)))
    return text


def _existing(noun: str, wanted: Sequence[int] | None, there: Sequence[int]) -> list[int]:
    if not there:
        raise ConfigError(f"this model has no {noun}, so there is nothing to inspect")
    missing = sorted(set(wanted or ()) - set(there))
    if missing:
        raise ConfigError(f"there is no {noun} {missing[0]}; this model has {', '.join(map(str, there))}")
    return list(there) if wanted is None else sorted(set(wanted))


def _findings(folder: RunFolder, config: Config, world: World, choice: Choice, step: int | None) -> dict[str, Any]:
    """Everything, on rank 0; on others the part that all know."""
    opened = open_run(folder, config, world, step)
    model, valid = opened.model, prepare_corpus(config.data).valid
    if valid is None:
        raise DataError(f"the text of {folder} has no validation split to look at; set data.valid_fraction")
    length = config.data.sequence_length
    # whole sequences where there is one: no padding then
    tokens = max(min(choice.tokens, len(valid) - 1) // length, 1) * length
    stream = EvalStream(valid, length, tokens)
    source = Source(stream, 0, stream.sequences, max(config.train.batch, world.size), DTYPES[config.train.dtype])
    bar = tqdm(total=2 * -(-source.sequences // source.part), desc="inspect", unit="pass", leave=False,
               disable=not world.is_main or None)
    with bar:
        calibrations = watch_experts(model, world, source, choice.layers, {"fisher"}, lambda: bar.update(1))
        chosen = {key: of_most_fisher(c, choice.top) for key, c in calibrations.items() if key[1] in choice.experts}
        top = _watch_tokens(model, world, source, chosen, bar)
    seen = source.sequences * length
    records = _records(folder, opened.step)
    words = Words(opened.tokenizer, valid, length)
    head = model.head_weight.detach()[words.used.to(world.device)]
    found: dict[str, Any] = {"run": str(folder), "step": opened.step, "tokens": stream.targets,
                             "compressions": _compressions(folder, opened.step), "experts": [], "overlap": []}
    for i, moe in model.moe_layers():
        if i not in choice.layers:
            continue
        around = Surroundings(model.layers[i].ffn_norm.weight.detach(), model.norm.weight.detach(), head)
        of_rank = {e: _expert(i, e, moe, calibrations, chosen, top, records, around, words, seen, config.model.expert_hidden)
                   for e in moe.dispatcher.layout.primary_experts}
        everywhere = {e: told for part in world.gather_objects(of_rank) for e, told in part.items()}  # a layer at a time
        if world.is_main:
            found["experts"] += [everywhere[e][0] for e in sorted(everywhere)]
            compared = overlaps({e: told[1] for e, told in everywhere.items()}, model.m.width, len(head))
            found["overlap"] += [overlap_facts(i, name, overlap) for name, overlap in compared.items()]
    return found


def _expert(layer: int, e: int, moe: MoELayer, calibrations: Calibrations, chosen: Mapping[Key, torch.Tensor],
            top: Mapping[Key, TopTokens], records: Mapping[int, Mapping[Key, NeuronRecord]], around: Surroundings,
            words: Words, seen: int, whole: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is told of an expert, what it is compared by), where it is."""
    key, calibration, form = (layer, e), calibrations[layer, e], moe.bank.form_of(e)
    expert, names = dense_expert(moe, e), moe.bank.stored(e).neurons
    ids = (torch.arange(form.hidden) if names is None else names.cpu()).numpy()
    past = history(records, key, ids)
    told = expert_facts(layer, e, form, moe.bank.dtype.itemsize, calibration, seen, past, whole)
    told["curve"] = curve_facts(past, calibration)
    if key in chosen:
        told["neurons"] = neuron_facts(expert, ids, calibration, chosen[key], top[key], around, words)
        told["dropped"] = dropped_facts(past)
    return told, profile(expert, calibration, around)


def _records(folder: RunFolder, step: int) -> dict[int, dict[Key, NeuronRecord]]:
    paths = {s: folder.neurons_file(s) for s in folder.compressions() if s <= step}
    return {s: read_records(path) for s, path in paths.items() if path.is_file()}


def _compressions(folder: RunFolder, step: int) -> list[dict[str, Any]]:
    told = (json.loads(folder.compression_file(s).read_text(encoding="utf-8")) for s in folder.compressions() if s <= step)
    return [{"step": one["step"], "method": one["compress"]["method"], "ratio": one["ratio"]} for one in told]


@torch.no_grad()
def _watch_tokens(model: Transformer, world: World, source: Source, chosen: Mapping[Key, torch.Tensor],
                  bar: tqdm) -> dict[Key, TopTokens]:
    """The tokens that make the chosen neurons (positions, by layer and expert of this rank) fire most. Collective."""
    watches = {i: _TokenWatch(moe, {e: chosen[i, e] for e in moe.dispatcher.layout.primary_experts if (i, e) in chosen},
                              source.stream.targets) for i, moe in model.moe_layers()}
    with primaries_only(model), watching(watches, model):
        for batch, targets in source.batches(model, world):
            for watch in watches.values():
                watch.keys_GS = batch.keys_GS.to(world.device)
            forward_loss(model, batch, targets, world.device, source.dtype)
            bar.update(1)
    return {(i, e): top for i, watch in watches.items() for e, top in watch.top.items()}


class _TokenWatch:
    """Sees the rows of one layer with the tokens they are of, whose keys travel the way of the rows."""

    def __init__(self, moe: MoELayer, chosen: Mapping[int, torch.Tensor], real: int):
        self.moe, self.real = moe, real
        self.keys_GS = torch.zeros(0, 0, dtype=torch.int64)
        self.experts = {e: dense_expert(moe, e).select(positions) for e, positions in chosen.items()}
        self.top = {e: TopTokens(len(positions), 3, moe.bank.device) for e, positions in chosen.items()}

    def __call__(self, rows_RD: torch.Tensor, y_RD: torch.Tensor, counts: list[int], routed: Assignment) -> torch.Tensor:
        keys = self.keys_GS
        if routed.mix_in is not None:  # a row that mixes tokens is taken for the one it has most of
            keys = keys.gather(1, routed.mix_in.argmax(2))
        arrived, _ = self.moe.dispatcher.plain.dispatch(keys.reshape(-1, 1), routed.token_ids_N, routed.expert_ids_N)
        for e, x, keys_n in zip(self.moe.bank.expert_ids, rows_RD.split(counts), arrived.squeeze(1).split(counts)):
            real = keys_n < self.real  # not what fills up the last sequence
            if e in self.top and real.any():
                with torch.autocast(x.device.type, enabled=False):
                    h = self.experts[e].neurons(x[real].to(self.experts[e].up.dtype))
                self.top[e].add(h, keys_n[real])
        return y_RD
