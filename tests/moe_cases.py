"""One MoE layer run on any number of ranks, for comparison with the same layer in one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch

from moedist.config import RouterConfig
from moedist.dispatch import Layout, Sharing, build_dispatcher, build_transport
from moedist.islands import Islands
from moedist.model.experts import build_bank
from moedist.model.feed_forward import FeedForward
from moedist.model.initialise import fill_normal
from moedist.model.moe import MoELayer
from moedist.placement import LayerPlan
from moedist.routing import RouterInput, build_router
from moedist.world import World
from tests.model.expert_forms import expert_of, fill, forms_of


@dataclass(frozen=True)
class Case:
    """A layer, a batch and where both live.

    `owners[e]` is a rank, or a tuple of ranks that hold copies, `shares[e]` then their shares (none given: equal);
    `sequences[r]` are the sequences of rank r. `kinds[e]` says how the matrices of expert e are stored (none given: dense),
    see `tests.model.expert_forms`. `islands[r]` is the island of rank r (none given: there are none).
    """

    owners: tuple[int | tuple[int, ...], ...]
    sequences: tuple[int, ...]
    router: str = "topk"
    top_k: int = 2
    sequence: int = 6
    width: int = 8
    widths: tuple[int, ...] = ()
    activation: str = "swiglu"
    capacity_factor: float | None = None
    bias: tuple[float, ...] = ()
    bias_in: str = "choice"
    seed: int = 0
    shared: int = 0
    training: bool = True
    shares: tuple[tuple[float, ...], ...] = ()
    kinds: tuple[str, ...] = ()
    islands: tuple[int, ...] = ()
    sharing: Sharing = Sharing()
    apart: bool = False  # rows stay in their island; every one has all experts
    aux: bool = True  # the router's own losses too
    options: tuple[tuple[str, object], ...] = ()  # of the router

    def plan(self) -> LayerPlan:
        owners = tuple(o if isinstance(o, tuple) else (o,) for o in self.owners)
        return LayerPlan(owners, self.shares or tuple((1 / len(o),) * len(o) for o in owners),
                         self.islands if self.apart else ())

    def alone(self) -> "Case":
        """The same case in a world of one."""
        return replace(self, owners=(0,) * len(self.owners), shares=(), sequences=(sum(self.sequences),), islands=(),
                       sharing=Sharing(), apart=False)


@dataclass
class Result:
    """What one rank saw; weights and their gradients by global name."""

    y: torch.Tensor
    grad_x: torch.Tensor
    loss: float
    grads: dict[str, torch.Tensor]
    expert_grads: dict[str, torch.Tensor]
    load: torch.Tensor
    rows_W: list[int]
    stats: dict[str, float] = field(default_factory=dict)


def run_case(world: World, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Result:
    """Forward and backward of the layer with this rank's part of the batch."""
    layer, bank = build_layer(world, case, device, dtype)
    first = sum(case.sequences[:world.rank])
    mine = slice(first, first + case.sequences[world.rank])
    total = sum(case.sequences)
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(total, case.sequence, case.width, generator=generator, dtype=torch.float64)
    probe = torch.randn(total, case.sequence, case.width, generator=generator, dtype=torch.float64)[mine]
    ids = torch.randint(0, 50, (total, case.sequence), generator=generator)
    keys = torch.arange(total * case.sequence).view(total, case.sequence)
    x = x[mine].to(device, dtype).requires_grad_()
    y, report = layer(RouterInput(x, ids[mine].to(device), keys[mine].to(device), case.seed, case.training))
    weights = layer.router.loss_weights()
    aux = sum(weights[k] * v for k, v in report.aux_losses.items()) if case.aux else 0
    loss = (y * probe.to(device, dtype)).sum() + aux
    loss.backward()
    expert_grads = bank.split_by_name(tuple(p.grad for p in bank.parameters()))
    return Result(y.detach().cpu(), x.grad.cpu(), loss.item(),
                  {n: torch.zeros_like(p).cpu() if p.grad is None else p.grad.cpu()
                   for n, p in layer.named_parameters()},
                  {n: g.cpu() for n, g in expert_grads.items()}, report.load_WE, report.rows_W,
                  {k: float(v) for k, v in report.stats.items()})


_groups: dict[tuple[int, ...], Islands] = {}  # of this rank: groups are made once


def on_islands(world: World, islands: tuple[int, ...]) -> World:
    """The world, with islands that are these, if any. Collective."""
    if not islands:
        return world
    if islands not in _groups:
        _groups[islands] = Islands.connect(islands, world.rank, [None] * world.size, timedelta(seconds=100))
    return replace(world, islands=islands, island_names=tuple(map(str, islands)), groups=_groups[islands])


def build_layer(world: World, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float64):
    experts = len(case.owners)
    layout = Layout(case.plan(), world.rank, world.size)
    widths = case.widths or (5,) * experts
    stored = {e: expert_of(case.kinds[e] if case.kinds else "dense", widths[e], case.width, 2, case.activation == "swiglu", e)
              for e in layout.local_experts}
    bank = build_bank(0, layout.local_experts, list(forms_of(stored).values()), case.width, case.activation, device, dtype)
    fill(bank, stored)
    config = RouterConfig(name=case.router, balance_loss=0.7, z_loss=0.3, capacity_factor=case.capacity_factor,
                          bias_rate=0.1 if case.bias else 0.0, bias_in=case.bias_in, options=dict(case.options))
    router = build_router(case.width, experts, case.top_k, config, case.sequence)
    shared = FeedForward(case.width, case.shared, case.activation) if case.shared else None
    transport = build_transport(on_islands(world, case.islands))
    dispatcher = build_dispatcher(layout, transport, torch.device(device), case.sharing, (0, world.meter))
    layer = MoELayer(router, bank, dispatcher, shared, world.meter)
    layer.to(device=device, dtype=dtype)
    for name, p in layer.named_parameters():
        fill_normal(p, 0.5, 1, name)
    if case.bias:
        router.bias.copy_(torch.tensor(case.bias))
    return layer, bank
