"""The MoE layer: route, dispatch, experts, combine.

G sequences of S tokens on this rank, T = G*S, D width, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import nn

from moedist.dispatch import AnyDispatcher
from moedist.model.bank import Bank
from moedist.model.feed_forward import FeedForward
from moedist.routing import Assignment, Router, RouterInput, balance_loss_sum, mix_seeds, most_trusted
from moedist.timing import Meter, region

Watch = Callable[[torch.Tensor, torch.Tensor, list[int], Assignment], torch.Tensor]


@dataclass(frozen=True)
class LayerReport:
    """What a layer says about one forward pass. Returned, never stored, so that recomputation counts nothing twice.

    Attributes:
        aux_losses: name -> sum over local tokens, unweighted, with gradient.
        stats: name -> detached sum over local tokens.
        load_WE: rows every rank sent to every expert (CPU).
        rows_P, rows_W: rows that each placement (see `Layout`) and each rank computed.
        demand_E: rows that wanted each expert over all ranks, before capacity (CPU).
        carried: what the router hands on to that of the next MoE layer.
    """

    aux_losses: dict[str, torch.Tensor]
    stats: dict[str, torch.Tensor]
    load_WE: torch.Tensor
    rows_P: torch.Tensor
    rows_W: list[int]
    demand_E: torch.Tensor
    carried: torch.Tensor | None = None


def joined(reports: Sequence[LayerReport]) -> LayerReport:
    """One report of several passes through a layer: sums, and what the last one hands on."""
    first, *others = reports
    for report in others:
        first = LayerReport(_summed(first.aux_losses, report.aux_losses), _summed(first.stats, report.stats),
                            first.load_WE + report.load_WE, first.rows_P + report.rows_P,
                            [a + b for a, b in zip(first.rows_W, report.rows_W)], first.demand_E + report.demand_E,
                            report.carried)
    return first


def _summed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + b[name] for name, value in a.items()}


class MoELayer(nn.Module):
    """A drop-in feed-forward whose experts live on the ranks that the plan names.

    The bank is deliberately not a submodule: the engine replicates what is in the module tree, and experts are not
    replicated.

    Attributes:
        watch: None, or called once in every forward pass (in each iteration, where there are several) with (rows that arrived,
            what their experts made of them, rows of each local expert, what the router of this rank wanted); what it returns
            takes the place of the experts' results.
            Set on all ranks or on none: rows then travel by `Dispatcher.plain`, which the watch may use too.
        restored: of experts in few bits, at how many of a token's, by router weight, their compensators are used; None: all.
            The same on every rank.
    """

    def __init__(self, router: Router, bank: Bank, dispatcher: AnyDispatcher, shared: FeedForward | None = None,
                 meter: Meter | None = None):
        super().__init__()
        self.router, self.shared, self.meter = router, shared, meter
        self.watch: Watch | None = None
        self.restored: int | None = None
        self._others: tuple[Router, ...] = ()  # of blocks that share the experts, whose submodules they are
        self.place(bank, dispatcher)

    def place(self, bank: Bank, dispatcher: AnyDispatcher) -> None:
        """Take other experts, and the dispatcher that knows where all are."""
        self._bank = (bank,)  # a tuple hides it from nn.Module
        self.dispatcher = dispatcher
        targets = dispatcher.layout.plan.targets
        for router in self.routers:
            router.targets_E = torch.tensor(targets, dtype=torch.float64) if targets else None

    def share_with(self, router: Router) -> None:
        """The router of another block sends rows to these experts too."""
        self._others += (router,)
        router.targets_E = self.router.targets_E

    @property
    def routers(self) -> tuple[Router, ...]:
        """All that send rows to these experts: of this block, and of others that share them."""
        return self.router, *self._others

    def after_step(self, demand_E: torch.Tensor) -> None:
        """See `Router.after_step`; rows of all blocks that share the experts."""
        for router in self.routers:
            router.after_step(demand_E)

    @property
    def bank(self) -> Bank:
        return self._bank[0]

    def forward(self, inputs: RouterInput) -> tuple[torch.Tensor, LayerReport]:
        """([G, S, D] output, report). Every rank must call it, with zero sequences too."""
        return self.by(self.router, inputs, self.shared)

    def by(self, router: Router, inputs: RouterInput, shared: FeedForward | None) -> tuple[torch.Tensor, LayerReport]:
        """As `forward`, with the router and the shared experts of any block that shares the experts."""
        if router.iterations == 1:
            return self._once(router, inputs, shared)
        x_GSD, reports = inputs.x_GSD, []
        for t in range(router.iterations):  # of Chain-of-Experts, which has the residual inside
            again = dataclasses.replace(inputs, x_GSD=x_GSD, seed=mix_seeds(inputs.seed, t), iteration=t)
            y_GSD, report = self._once(router, again, None if t else shared)
            x_GSD = x_GSD + y_GSD
            reports.append(report)
        return x_GSD, joined(reports)

    def _once(self, router: Router, inputs: RouterInput,
              shared_experts: FeedForward | None) -> tuple[torch.Tensor, LayerReport]:
        x_GSD = inputs.x_GSD
        with region("route"):
            routed = router(inputs)
        source = x_GSD if routed.mix_in is None else routed.mix_in.to(x_GSD.dtype) @ x_GSD
        timed = functools.partial(self.meter.expert, self.bank.layer) if self.meter and self.training else nullcontext

        flags = [] if self.restored is None else [most_trusted(routed.token_ids_N, routed.weights_N, self.restored)]
        named = ExitStack()  # the region until experts start, and again when they are done

        def experts(rows_RD: torch.Tensor, counts_L: list[int], *flags_R: torch.Tensor) -> torch.Tensor:
            named.close()
            results = self.bank(rows_RD, counts_L, timed, *(flags_R if self.bank.restores else ()))
            named.enter_context(region("combine"))
            return results if self.watch is None else self.watch(rows_RD, results, counts_L, routed)

        named.enter_context(region("dispatch"))
        dispatcher = self.dispatcher if self.watch is None else self.dispatcher.plain
        finish, loads = dispatcher.run(source.flatten(0, 1), routed.token_ids_N, routed.expert_ids_N, routed.weights_N,
                                       routed.demand_E, experts, *flags)
        shared = None if shared_experts is None else shared_experts(x_GSD)  # while rows travel back
        y = finish().view_as(source)
        named.close()
        if routed.mix_out is not None:
            y = routed.mix_out.to(y.dtype) @ y
        if routed.direct_TD is not None:
            y = y + routed.direct_TD.to(y.dtype).view_as(y)
        if shared is not None:
            if routed.shared_gate_T1 is not None:
                shared = shared * routed.shared_gate_T1.to(shared.dtype).view(*x_GSD.shape[:2], 1)
            y = y + shared.to(y.dtype)
        demand_E = loads.extra_W.sum(0)
        aux = dict(routed.aux_losses)
        if routed.prob_sum_E is not None:
            aux["balance_loss"] = balance_loss_sum(routed.prob_sum_E, demand_E.to(x_GSD.device), router.balance_targets())
        return y, LayerReport(aux, routed.stats, loads.load_WE, loads.rows_P, loads.rows_W, demand_E, routed.carried)


class PooledLayer(nn.Module):
    """A feed-forward with a router, and shared experts, of its own, that sends rows to the experts of another block."""

    def __init__(self, router: Router, owner: MoELayer, shared: FeedForward | None = None):
        super().__init__()
        self.router, self.shared = router, shared
        self._owner = (owner,)  # a tuple hides it from nn.Module
        owner.share_with(router)

    @property
    def owner(self) -> MoELayer:
        return self._owner[0]

    def forward(self, inputs: RouterInput) -> tuple[torch.Tensor, LayerReport]:
        """See `MoELayer`."""
        return self.owner.by(self.router, inputs, self.shared)
