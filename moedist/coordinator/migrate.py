"""Move experts to the ranks of a new plan, with their optimizer state, between two steps.

Layer by layer; within a layer in rounds, in each of which every pair of ranks has at most one expert in flight, so that
the memory it takes is one layer's bank and one expert a pair. An expert's state lives on its primary and moves from old
primary to new; copies then get their weights as after every step.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from moedist.dispatch import Dispatcher, Layout, Transport
from moedist.engine import TorchEngine
from moedist.engine.expert_optimizer import Pair
from moedist.model import ExpertBank
from moedist.placement import LayerPlan, Plan
from moedist.world import World


def migrate(world: World, engine: TorchEngine, new: Plan) -> int:
    """Bring the experts of the engine's model to where `new` has them. Every rank must call it, between two steps.

    Returns:
        Experts moved, over all layers and ranks. Training goes on as if none had been.
    """
    model, moved, moments = engine.model, 0, {}
    for layer, moe in model.moe_layers():
        dispatcher, layout = moe.dispatcher, Layout(new.layer(layer), world.rank, world.size)
        tensors = engine.experts.tensors(layer)
        if layout.plan.owners == dispatcher.layout.plan.owners:  # at most the shares differ
            moe.place(moe.bank, Dispatcher(layout, dispatcher.transport, moe.bank.w_in.device))
            moments[layer] = tensors[1:]
            continue
        rounds = rounds_of_moves(dispatcher.layout.plan, layout.plan)
        moved += sum(len(moves) for moves in rounds)
        widths = _all_widths(world, moe.bank, layout.plan.experts)
        bank = ExpertBank(layer, layout.local_experts, moe.bank.width, [widths[e] for e in layout.local_experts],
                          moe.bank.activation, moe.bank.w_in.device, moe.bank.w_in.dtype)
        target = [_like(bank), *(_zeros_like(bank) for _ in tensors[1:])]
        for e in set(moe.bank.expert_ids) & set(bank.expert_ids):
            for here, there in zip(_blocks(bank, e, target), _blocks(moe.bank, e, tensors)):
                here.copy_(there)
        for moves in rounds:
            _carry_out(moves, moe.bank, tensors, bank, target, dispatcher.transport)
        moe.place(bank, Dispatcher(layout, dispatcher.transport, bank.w_in.device))
        model.banks[layer] = bank
        moments[layer] = target[1:]
    engine.placed(moments)
    return moved


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


def _carry_out(moves: list[Move], old: ExpertBank, source: list[Pair], new: ExpertBank, target: list[Pair],
               transport: Transport) -> None:
    """One exchange: what this rank sends and what it gets, each in the order of the other's rank."""
    outgoing = {to: _blocks(old, e, source) for e, at, to in moves if at == transport.rank}
    incoming = {at: _blocks(new, e, target) for e, at, to in moves if to == transport.rank}
    send, receive = ([sum(b.numel() for b in blocks.get(r, ())) for r in range(transport.world_size)]
                     for blocks in (outgoing, incoming))
    like = target[0][0]
    flat = [block.reshape(-1) for r in sorted(outgoing) for block in outgoing[r]]
    out = like.new_empty(sum(receive))
    transport.exchange(torch.cat(flat) if flat else like.new_empty(0), send, receive, out=out)
    here = [block for r in sorted(incoming) for block in incoming[r]]
    for block, values in zip(here, out.split([b.numel() for b in here])):
        block.copy_(values.view_as(block))


def _blocks(bank: ExpertBank, expert: int, tensors: list[Pair]) -> list[torch.Tensor]:
    """The rows of one expert in its weights and moments, to be written to or read from."""
    return [block for pair in tensors for block in bank.blocks_of(expert, *pair)]


def _like(bank: ExpertBank) -> Pair:
    return bank.w_in.detach(), bank.w_out.detach()


def _zeros_like(bank: ExpertBank) -> Pair:
    return torch.zeros_like(bank.w_in.detach()), torch.zeros_like(bank.w_out.detach())


def _all_widths(world: World, bank: ExpertBank, experts: int) -> list[int]:
    """The hidden width of every expert of a layer, from the ranks that hold them."""
    widths_E = torch.zeros(experts, dtype=torch.int64)
    widths_E[bank.expert_ids] = torch.tensor(bank.widths, dtype=torch.int64)
    return world.all_reduce_(widths_E, "max").tolist()
