"""Put the experts of a distributed model in few bits: each on the rank that owns it, within one budget for all.

The stages of `moedist.compress.beam`, over ranks. The model is for evaluation and generation then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

from moedist.compress import Beam, Compressed, LowBit
from moedist.compress.beam import facts, lower, measured_loss, offer, relative_error, restore
from moedist.compress.beam_budget import decide_bits, decide_ranks
from moedist.errors import CompressError
from moedist.model import Bank, ExpertForm, Transformer, build_bank
from moedist.model.forms import indices_of, tensors_of
from moedist.phases.calibrate import Calibrations, dense_expert
from moedist.phases.shrink import all_or_none, merged
from moedist.world import World

Key = tuple[int, int]  # (layer, expert)
Known = dict[tuple[Any, ...], dict[str, LowBit]]  # experts in few bits that have been made before, by all that makes them


@dataclass(frozen=True)
class LowSummary:
    """What became of one expert.

    Attributes:
        bytes: stored; compensator_bytes: of them in compensators.
        weights: numbers that it has.
        rank: of each matrix's compensator, by part.
        error, restored_error: of its outputs, relative, without and with compensators (see `relative_error`).
        loss, restored_loss: the same in the norm of gradients.
    """

    layer: int
    expert: int
    bits: int
    bytes: int
    compensator_bytes: int
    weights: int
    rank: Mapping[str, int]
    kurtosis: float
    rows: float
    router_weight: float
    error: float
    restored_error: float
    loss: float
    restored_loss: float


def refuse_factored(model: Transformer, world: World) -> None:
    """Raise CompressError on every rank where an expert is not dense: the saving of its factors would be lost."""
    kinds = {("in few bits" if form.is_lowbit else "factored") for bank in model.banks.values() for form in bank.forms
             if not form.is_dense}
    found = sorted(set().union(*world.gather_objects(kinds)))
    if found:
        raise CompressError(f"experts are {found[0]} already: put a run in few bits whose experts are dense, uncompressed or "
                            "by method cur (or make them dense first: moedist compress RUN --dense)")


def lower_experts(model: Transformer, world: World, calibrations: Calibrations,
                  beam: Beam, known: Known | None = None) -> tuple[dict[Key, Compressed], list[LowSummary]]:
    """The experts that this rank owns in few bits, and what became of all experts of all ranks. Every rank must call it.

    Args:
        known: what earlier calls with the same calibrations have made, without compensators; is filled.

    Raises:
        CompressError: a budget below the bytes of the weights alone, a group that does not divide the width, values that are
            not finite; on every rank.
    """
    experts = {(i, e): dense_expert(dict(model.moe_layers())[i], e) for i, e in calibrations}
    known = {} if known is None else known
    low: dict[Key, dict[int, dict[str, LowBit]]] = {key: {} for key in experts}
    with all_or_none(world):
        for key, expert in experts.items():
            for bits in beam.widths:
                made = (key, bits, beam.group, beam.symmetric, beam.quantiser)
                if made not in known:
                    known[made] = lower(expert, calibrations[key], beam, bits)
                low[key][bits] = known[made]
        offers = {key: [offer(expert, calibrations[key], beam, bits, low[key][bits]) for bits in beam.widths]
                  for key, expert in experts.items()}
    rows = merged(world.gather_objects({key: float(c.rows) for key, c in calibrations.items()}))
    weights = merged(world.gather_objects({key: float(c.weight) for key, c in calibrations.items()}))
    # rank 0 solves: another machine's library may find another of equally good solutions
    everything = merged(world.gather_objects(offers))
    bits = _on_main(world, lambda: decide_bits(everything, beam, rows, weights))
    with all_or_none(world):
        told = {key: facts(expert, calibrations[key], beam, low[key][bits[key]]) for key, expert in experts.items()}
    lowered = merged(world.gather_objects(told))
    ranks = _on_main(world, lambda: decide_ranks(lowered, beam))
    found, summaries = {}, []
    for key, expert in experts.items():
        parts, calibration = low[key][bits[key]], calibrations[key]
        new = found[key] = _renamed(restore(expert, calibration, beam, parts, ranks[key]), model, key)
        compensators = sum(m.compensator.bytes for m in new.parts.values() if m.compensator is not None)
        before = next(o for o in offers[key] if o.bits == bits[key])
        summaries.append(LowSummary(*key, bits[key], new.bytes, compensators, expert.numbers, ranks[key], told[key].kurtosis,
                                    rows[key], weights[key], before.error,
                                    relative_error(expert, calibration, beam, new.parts), before.loss,
                                    measured_loss(expert, calibration, beam, new.parts)))
    everywhere = [s for of_rank in world.gather_objects(summaries) for s in of_rank]
    return found, sorted(everywhere, key=lambda s: (s.layer, s.expert))


def low_banks(model: Transformer, compressed: Mapping[Key, Compressed]) -> dict[int, Bank]:
    """Banks of these experts, layer by layer; all that this rank has must be among them."""
    banks = {}
    for layer, old in model.banks.items():
        mine = {e: compressed[layer, e] for e in old.expert_ids}
        bank = banks[layer] = build_bank(layer, old.expert_ids, [ExpertForm.of(new) for new in mine.values()], old.width,
                                         old.activation, old.device, old.dtype)
        for e, new in mine.items():
            for name, view in bank.split(e, bank.weights()).items():
                view.copy_(tensors_of(new)[name])
            vectors = indices_of(new)
            for name, view in bank.form_of(e).split_indices(bank.indices_of(e)).items():
                view.copy_(vectors[name])
    return banks


def put_banks(model: Transformer, banks: Mapping[int, Bank]) -> None:
    """Let the layers use these banks."""
    for layer, moe in model.moe_layers():
        moe.place(banks[layer], moe.dispatcher)
        model.banks[layer] = banks[layer]


def _renamed(new: Compressed, model: Transformer, key: Key) -> Compressed:
    """With the neurons that an earlier compression has kept."""
    before = dict(model.moe_layers())[key[0]].bank.stored(key[1])
    return Compressed(before.hidden, before.neurons, new.parts)


def _on_main(world: World, decide):
    """What rank 0 decides, on every rank; its error is raised on all."""
    found = None
    with all_or_none(world):
        if world.is_main:
            found = decide()
    return world.broadcast_object(found)
