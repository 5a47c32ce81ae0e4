"""Take experts in other forms, and go on training: what a compression phase ends with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Mapping

import torch

from moedist.compress import Compressed
from moedist.engine.dense_moments import dense_moments
from moedist.engine.interface import Engine
from moedist.model import Bank, BankTensors, ExpertForm, MoELayer, build_bank
from moedist.model.bank import joined, spread
from moedist.model.forms import by_part, indices_of, named, tensors_of


@dataclass(frozen=True)
class _Stored:
    """An expert as a bank stores it: its form, and its index vectors one after another, int32 on the CPU."""

    form: ExpertForm
    indices: torch.Tensor


@torch.no_grad()
def replace_experts(engine: Engine, compressed: Mapping[int, Mapping[int, Compressed]]) -> None:
    """Store experts as given from now on. Every rank must call it, between two steps.

    Adam's moments are mapped (indexed for whole neurons, by the chain rule for factors) and the count of updates stays.
    Copies take what their primary has. An expert that has been compressed before keeps the names of its neurons from
    before the first compression.

    Args:
        compressed: layer -> expert -> its new form, of experts that this rank is the primary of; all others stay as they
            are. `hidden` of each is the number of neurons that the expert has now.

    Raises:
        ValueError: an expert that this rank does not update, or of another number of neurons.
    """
    moments = {layer: _replace(engine, moe, compressed.get(layer, {})) for layer, moe in engine.model.moe_layers()}
    engine.placed(moments)


def _replace(engine: Engine, moe: MoELayer, compressed: Mapping[int, Compressed]) -> list[BankTensors]:
    """Put the layer's new bank in place; returns its moments."""
    old, layout, tensors = moe.bank, moe.dispatcher.layout, engine.experts.tensors(moe.bank.layer)
    _refuse_strangers(old, layout.primary_experts, compressed)
    changed = {e: _described(old, e, new) for e, new in compressed.items()}
    if layout.has_copies:
        copied = {e: stored for e, stored in changed.items() if len(layout.plan.owners[e]) > 1}
        for of_rank in engine.world.gather_objects(copied):
            changed.update({e: stored for e, stored in of_rank.items() if e in old.expert_ids})
    if not changed:
        return tensors[1:]
    bank = build_bank(old.layer, old.expert_ids, [changed[e].form if e in changed else old.form_of(e) for e in old.expert_ids],
                      old.width, old.activation, old.device, old.dtype)
    target = [bank.weights(), *(tuple(map(torch.zeros_like, bank.weights())) for _ in tensors[1:])]
    for e in bank.expert_ids:
        bank.indices_of(e).copy_(changed[e].indices if e in changed else old.indices_of(e))
        if e in compressed:
            values = [tensors_of(compressed[e]), *_mapped_moments(old, e, tensors[1:], compressed[e])]
            for views, new in zip(target, values):
                for name, view in bank.split(e, views).items():
                    view.copy_(new[name])
        elif e not in changed:  # a changed copy gets its weights as after every step, and has no moments
            for views, before in zip(target, tensors):
                spread(joined(old.blocks_of(e, before)), bank.blocks_of(e, views))
    moe.place(bank, moe.dispatcher)
    engine.model.banks[old.layer] = bank
    return target[1:]


def _refuse_strangers(bank: Bank, primaries: list[int], compressed: Mapping[int, Compressed]) -> None:
    strangers = sorted(set(compressed) - set(primaries))
    if strangers:
        raise ValueError(f"experts {strangers} of layer {bank.layer} are updated by other ranks, this one has {primaries}")
    for e, new in compressed.items():
        if new.hidden != bank.form_of(e).hidden:
            raise ValueError(f"expert {e} of layer {bank.layer} has {bank.form_of(e).hidden} neurons, and was compressed "
                             f"from {new.hidden}")


def _described(bank: Bank, expert: int, new: Compressed) -> _Stored:
    """How `new` is stored, with its neurons named as before the first compression."""
    names = bank.stored(expert).neurons
    if names is not None:
        kept = slice(None) if new.neurons is None else new.neurons.to(names.device).long()
        new = dataclasses.replace(new, neurons=names[kept])
    form, vectors = ExpertForm.of(new), indices_of(new)
    flat = [vectors[name].to("cpu", torch.int32) for name, _ in form.indices]
    return _Stored(form, torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int32))


def _mapped_moments(bank: Bank, expert: int, moments: list[BankTensors], new: Compressed) -> list[dict[str, torch.Tensor]]:
    """Adam's first and second moment of the new tensors, by name."""
    before = bank.stored(expert)
    found = []
    for second, moment in enumerate(moments):
        dense = dense_moments(before, by_part(bank.split(expert, moment)), bool(second))
        found.append(named(new, new.map_moments(dense.get("gate"), dense["up"], dense["down"], second=bool(second))))
    return found
