"""Compress the experts of a distributed model: each on the rank that updates it, within one budget for all.

The stages of `moedist.compress`, over ranks: watch the experts, gather what every unit is worth, decide on every rank alike,
compress. Nothing of the model is changed here; `moedist.engine.replace_experts` puts the result in its place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from moedist.compress import Budget, Compressed, Curve, Method, build_method, decide
from moedist.config import CompressConfig
from moedist.errors import CompressError, MoedistError
from moedist.model import Transformer
from moedist.neurons.record import NeuronRecord, keeps_neurons, record_of
from moedist.phases.calibrate import Calibrations, Source, dense_expert, layer_groups, watch_bytes, watch_experts
from moedist.world import World

Key = tuple[int, int]  # (layer, expert)
Keep = dict[Key, dict[str, int]]


@dataclass(frozen=True)
class ExpertSummary:
    """What became of one expert. Bytes are those stored, index vectors included; rows are of the calibration."""

    layer: int
    expert: int
    rank: int
    hidden_before: int
    hidden: int
    bytes_before: int
    bytes: int
    rows: float
    router_weight: float
    keep: Mapping[str, int]
    fisher_kept: float | None


@dataclass(frozen=True)
class Shrunk:
    """Experts of this rank in their new form, and what became of all experts of all ranks, by layer and expert.

    `records` tell of kept and dropped neurons, for methods that choose whole ones: of all experts on rank 0, none elsewhere.
    """

    compressed: dict[int, dict[int, Compressed]]
    summaries: list[ExpertSummary]
    records: dict[Key, NeuronRecord]

    @property
    def ratio(self) -> float:
        """Share of bytes removed, over all experts."""
        return 1 - sum(s.bytes for s in self.summaries) / max(1, sum(s.bytes_before for s in self.summaries))


def method_of(c: CompressConfig) -> Method:
    """The method that a configuration describes; CompressError where it has no such option."""
    return build_method(c.method, **c.options)


def shrink(model: Transformer, world: World, source: Source, c: CompressConfig,
           progress: Callable[..., Any] = tqdm) -> Shrunk:
    """Compress all experts. Every rank must call it.

    Where the sums of all layers together would take more than `c.calibration_bytes` on a rank, a few layers are watched at a
    time, once to decide and once more to compress.

    Raises:
        CompressError: an impossible budget, values that are not finite; on every rank, whichever found it.
    """
    method = method_of(c)
    needs = method.needs | {"fisher"} if keeps_neurons(method) else method.needs  # records tell of it
    layers = [i for i, _ in model.moe_layers()]
    sizes = world.all_reduce_(torch.tensor([watch_bytes(model, i, needs) for i in layers]), "max").tolist()
    groups = layer_groups(zip(layers, sizes), c.calibration_bytes)
    passes = -(-source.sequences // source.part) * (len(groups) if len(groups) == 1 else len(groups) * (len(method.shares) + 1))
    bar = progress(total=passes, desc=f"compress {c.method}", unit="pass", leave=False, disable=not world.is_main or None)
    kept: dict[int, Calibrations] = {}

    def calibrations_of(group: list[int]) -> Calibrations:
        if group[0] not in kept:
            kept.clear()
            kept[group[0]] = watch_experts(model, world, source, group, needs, lambda: bar.update(1))
        return kept[group[0]]

    rows: dict[Key, float] = {}

    def gains(decided: Mapping[Key, Mapping[str, int]]) -> dict[Key, list[Curve]]:
        curves: dict[Key, list[Curve]] = {}
        for group in groups:
            calibrations = calibrations_of(group)
            rows.update({key: float(calibration.rows) for key, calibration in calibrations.items()})
            with all_or_none(world):
                curves.update({key: method.gains(_expert(model, key), calibration, decided.get(key, {}))
                               for key, calibration in calibrations.items()})
        return merged(world.gather_objects(curves))

    with bar:
        budget = _budget(c, model, world)
        whole = merged(world.gather_objects(_bytes_now(model, list(_primaries(model)))))
        frequency = None
        if c.budget == "frequency":
            gains({})  # fills rows
            frequency = merged(world.gather_objects(rows))
        itemsize = next(iter(model.banks.values())).dtype.itemsize
        keep = decide(method, gains, budget, c.budget, c.floor, frequency, itemsize)
        compressed: dict[int, dict[int, Compressed]] = {i: {} for i in layers}
        summaries: list[ExpertSummary] = []
        records: dict[Key, NeuronRecord] = {}
        for group in groups:
            calibrations, of_group = calibrations_of(group), {}
            with all_or_none(world):
                for (layer, e), calibration in calibrations.items():
                    new = method.compress(_expert(model, (layer, e)), calibration, keep[layer, e])
                    compressed[layer][e] = new
                    summaries.append(_summary(world.rank, layer, e, new, whole[layer, e], calibration, keep[layer, e]))
                    if keeps_neurons(method):
                        of_group[layer, e] = record_of(method, calibration, new, _names(model, (layer, e)))
            found = world.gather_objects(of_group)  # a group at a time: only rank 0 holds more
            records.update(merged(found) if world.is_main else {})
    everywhere = [s for of_rank in world.gather_objects(summaries) for s in of_rank]
    return Shrunk(compressed, sorted(everywhere, key=lambda s: (s.layer, s.expert)), records)


class all_or_none:
    """Around work that each rank does by itself: a CompressError on one is raised on all, with the rank's name."""

    def __init__(self, world: World):
        self.world = world

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        mine = str(error) if isinstance(error, MoedistError) else None
        if error is not None and mine is None:
            return False
        failed = [f"rank {r}: {words}" for r, words in enumerate(self.world.gather_objects(mine)) if words]
        if failed:
            raise CompressError("; ".join(failed)) from error
        return False


def _primaries(model: Transformer) -> list[Key]:
    return [(i, e) for i, moe in model.moe_layers() for e in moe.dispatcher.layout.primary_experts]


def _expert(model: Transformer, key: Key):
    return dense_expert(dict(model.moe_layers())[key[0]], key[1])


def _names(model: Transformer, key: Key) -> torch.Tensor | None:
    """Ids of an expert's neurons before the first compression; None: all are there."""
    return dict(model.moe_layers())[key[0]].bank.stored(key[1]).neurons


def _bytes_now(model: Transformer, keys: list[Key]) -> dict[Key, int]:
    banks = model.banks
    return {(i, e): banks[i].form_of(e).bytes(banks[i].dtype.itemsize) for i, e in keys}


def _budget(c: CompressConfig, model: Transformer, world: World) -> Budget:
    """Bytes per rank count copies where they are."""
    owners = {(i, e): ranks for i, moe in model.moe_layers() for e, ranks in enumerate(moe.dispatcher.layout.plan.owners)}
    return Budget(c.ratio, c.bytes, c.rank_bytes, owners if c.rank_bytes is not None else None)


def merged(parts: Sequence[dict]) -> dict:
    """One dict of those of all ranks."""
    merged: dict = {}
    for part in parts:
        merged.update(part)
    return merged


def _summary(rank: int, layer: int, e: int, new: Compressed, before: int, calibration: Any,
             keep: Mapping[str, int]) -> ExpertSummary:
    fisher, kept = calibration.fisher, new.neurons
    share = None
    if fisher is not None:
        total = float(fisher.sum())
        share = 1.0 if kept is None or total == 0 else float(fisher[kept.long()].sum()) / total
    return ExpertSummary(layer, e, rank, new.hidden, new.hidden if kept is None else len(kept), before, new.bytes,
                         float(calibration.rows), float(calibration.weight), dict(keep), share)


def summaries_json(shrunk: Shrunk, c: CompressConfig, step: int) -> dict[str, Any]:
    """What a run folder keeps of a compression."""
    return {"step": step, "compress": dataclasses.asdict(c), "ratio": shrunk.ratio,
            "experts": [dataclasses.asdict(s) for s in shrunk.summaries]}
