"""Move experts to the ranks of a new plan, with their optimizer state, between two steps.

Layer by layer; within a layer in rounds, in each of which every pair of ranks has at most one expert in flight, so that
the memory it takes is one layer's bank and one expert a pair. An expert's state lives on its primary and moves from old
primary to new; copies then get their weights as after every step. An expert brings its form and index vectors, and what
has arrived decides of which kind a bank is.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from moedist.dispatch import Layout, Transport
from moedist.engine import Engine
from moedist.model import Bank, BankTensors, ExpertForm, build_bank
from moedist.model.bank import joined, spread
from moedist.placement import LayerPlan, Plan
from moedist.world import World


def migrate(world: World, engine: Engine, new: Plan) -> int:
    """Bring the experts of the engine's model to where `new` has them. Every rank must call it, between two steps.

    Returns:
        Experts moved, over all layers and ranks. Training goes on as if none had been.
    """
    model, moved, moments = engine.model, 0, {}
    for layer, moe in model.moe_layers():
        dispatcher, layout = moe.dispatcher, moe.dispatcher.layout.with_plan(new.layer(layer))
        tensors = engine.experts.tensors(layer)
        before = dispatcher.layout.plan
        if layout.plan.owners == before.owners and layout.plan.primaries == before.primaries:  # at most the shares differ
            moe.place(moe.bank, dispatcher.for_layout(layout))
            moments[layer] = tensors[1:]
            continue
        rounds = rounds_of_moves(before, layout.plan)
        moved += sum(len(moves) for moves in rounds)
        bank = _empty_bank(world, moe.bank, dispatcher.layout, layout)
        target = [bank.weights(), *(tuple(map(torch.zeros_like, bank.weights())) for _ in tensors[1:])]
        for e in set(moe.bank.expert_ids) & set(bank.expert_ids):
            spread(joined(_blocks(moe.bank, e, tensors)), _blocks(bank, e, target))
        for moves in rounds:
            _carry_out(moves, moe.bank, tensors, bank, target, dispatcher.transport)
        moe.place(bank, dispatcher.for_layout(layout))
        model.banks[layer] = bank
        moments[layer] = target[1:]
    engine.placed(moments)
    return moved


def _empty_bank(world: World, old: Bank, before: Layout, after: Layout) -> Bank:
    """This rank's bank in the new layout, its index vectors filled; forms of newcomers come from their old primaries."""
    described = {e: (old.form_of(e), old.indices_of(e).cpu().clone()) for e in before.primary_experts
                 if not set(after.plan.owners[e]) <= set(before.plan.owners[e])}
    known: dict[int, tuple[ExpertForm, torch.Tensor]] = {}
    for of_rank in world.gather_objects(described):
        known.update(of_rank)
    known.update({e: (old.form_of(e), old.indices_of(e)) for e in old.expert_ids})
    forms = [known[e][0] for e in after.local_experts]
    bank = build_bank(old.layer, after.local_experts, forms, old.width, old.activation, old.device, old.dtype)
    for e in bank.expert_ids:
        bank.indices_of(e).copy_(known[e][1])
    return bank


Move = tuple[int, int, int]  # expert, from rank, to rank


def rounds_of_moves(old: LayerPlan, new: LayerPlan) -> list[list[Move]]:
    """Moves of primaries, in rounds where every pair of ranks appears at most once.

    >>> rounds_of_moves(LayerPlan.single([0, 0, 1]), LayerPlan.single([1, 1, 0]))
    [[(0, 0, 1), (2, 1, 0)], [(1, 0, 1)]]
    """
    of_pair: dict[tuple[int, int], list[int]] = defaultdict(list)
    for e, (source, target) in enumerate(zip(old.primaries, new.primaries)):
        if source != target:
            of_pair[source, target].append(e)
    rounds = max(map(len, of_pair.values()), default=0)
    return [[(experts[i], *pair) for pair, experts in of_pair.items() if i < len(experts)] for i in range(rounds)]


def _carry_out(moves: list[Move], old: Bank, source: list[BankTensors], new: Bank, target: list[BankTensors],
               transport: Transport) -> None:
    """One exchange: what this rank sends and what it gets, each in the order of the other's rank."""
    outgoing = {to: _blocks(old, e, source) for e, at, to in moves if at == transport.rank}
    incoming = {at: _blocks(new, e, target) for e, at, to in moves if to == transport.rank}
    send, receive = ([sum(b.numel() for b in blocks.get(r, ())) for r in range(transport.world_size)]
                     for blocks in (outgoing, incoming))
    like = target[0][0]
    sent = [block for r in sorted(outgoing) for block in outgoing[r]]
    out = like.new_empty(sum(receive))
    transport.exchange(joined(sent) if sent else like.new_empty(0), send, receive, out=out)
    spread(out, [block for r in sorted(incoming) for block in incoming[r]])


def _blocks(bank: Bank, expert: int, tensors: list[BankTensors]) -> list[torch.Tensor]:
    """The numbers of one expert in its weights and moments, to be written to or read from."""
    return [block for of_bank in tensors for block in bank.blocks_of(expert, of_bank)]
