"""`moedist bench layer`: our MoE layer against other implementations with the same weights, forward and backward.

Also against one dense feed-forward of the same FLOPs on as many rows, which a perfect grouped GEMM would reach, and on a
machine with an accelerator, the accelerator against the CPU.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

import torch
from torch import nn

from moedist.bench.figures import write_figures
from moedist.bench.interleave import interleaved_medians
from moedist.bench.peers import Forward, Peer, peers_of
from moedist.config import RouterConfig
from moedist.dispatch import Dispatcher, Layout, LocalTransport
from moedist.errors import MoedistError
from moedist.model import ExpertBank, MoELayer
from moedist.model.feed_forward import FeedForward
from moedist.model.initialise import fill_normal
from moedist.placement import LayerPlan
from moedist.routing import RouterInput, build_router
from moedist.world import keep_freed_memory


class Shape(NamedTuple):
    """T tokens, D width, F expert hidden width, E experts, K top-k."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int


SHAPES = {"coarse": Shape(4096, 512, 2048, 8, 2), "fine": Shape(512, 512, 128, 64, 8), "tiny": Shape(64, 32, 16, 8, 2),
          "poster": Shape(4096, 512, 2048, 8, 2)}
DENSE, BARE = "dense feed-forward", "bare GEMM pair"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest difference of a token's output over the largest output, and the part of tokens that must be within it: some
# peers score the experts in bfloat16, which sends a token with close scores to another expert.
AGREEMENT = {torch.float32: (1e-4, 0.995), torch.bfloat16: (5e-2, 0.75)}


def build_bench_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> MoELayer:
    """A top-k SwiGLU layer with all experts here and seeded weights."""
    layout = Layout(LayerPlan.single([0] * shape.experts), 0, 1)
    bank = ExpertBank(0, layout.local_experts, shape.width, [shape.hidden] * shape.experts, "swiglu", device, dtype)
    bank.initialise(0, 0.02, 0.02)
    config = RouterConfig(balance_loss=0, z_loss=0)  # the peers compute no router losses here
    router = build_router(shape.width, shape.experts, shape.top_k, config, shape.tokens)
    layer = MoELayer(router, bank, Dispatcher(layout, LocalTransport(), device)).to(device=device, dtype=dtype)
    fill_normal(router.weight, 0.02, 0, "router")
    return layer


def our_forward(layer: MoELayer, tokens: int, device: torch.device) -> Forward:
    """The layer as a function of [1, T, D] alone."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    return lambda x: layer(RouterInput(x, ids, ids, 0, True))[0]


def forward_backward(forward: Forward, parameters: Sequence[torch.Tensor], x: torch.Tensor,
                     grad: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that runs forward and backward and forgets the gradients."""
    def run() -> torch.Tensor:
        x.grad = None
        y = forward(x)
        y.backward(grad)
        for p in parameters:
            p.grad = None
        return y.detach()

    return run


def dense_references(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Peer]:
    """What as many rows and FLOPs cost without experts: all T*K rows through one set of weights, which stay in cache.

    "dense feed-forward" is one expert, a GEMM pair D -> 2F and F -> D with SwiGLU between; "bare GEMM pair" has the same
    FLOPs as D -> 1.5F -> D with nothing between.
    """
    inner = 3 * shape.hidden // 2
    bare = nn.Sequential(nn.Linear(shape.width, inner, bias=False), nn.Linear(inner, shape.width, bias=False))
    found = {DENSE: FeedForward(shape.width, shape.hidden, "swiglu"), BARE: bare}
    return {name: (module.to(device=device, dtype=dtype), module) for name, module in found.items()}


def measure(shape_name: str, dtype_name: str, rounds: int) -> tuple[dict[str, float], list[str]]:
    """(median seconds by implementation, what was left out); checks that all give the same output first.

    Raises:
        MoedistError: an implementation computes something else, so that times cannot be compared.
    """
    shape, dtype, device = SHAPES[shape_name], DTYPES[dtype_name], bench_device()
    torch.manual_seed(0)
    layer = build_bench_layer(shape, dtype, device)
    x = torch.randn(1, shape.tokens, shape.width, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    peers, left_out = peers_of(layer, shape.tokens, dtype, device)
    forwards = {"moedist": (our_forward(layer, shape.tokens, device), [*layer.parameters(), *layer.bank.parameters()])}
    forwards |= {name: (forward, list(module.parameters())) for name, (module, forward) in peers.items()}
    runs = {name: forward_backward(forward, ps, x, grad) for name, (forward, ps) in forwards.items()}
    _check_agreement(runs, dtype)
    rows = torch.randn(shape.tokens * shape.top_k, shape.width, device=device).to(dtype).requires_grad_()
    for name, (module, forward) in dense_references(shape, dtype, device).items():
        runs[name] = forward_backward(forward, list(module.parameters()), rows, torch.randn_like(rows))
    return interleaved_medians(runs, rounds, device=device), left_out


def bench_device() -> torch.device:
    """The accelerator if there is one, else the CPU with its allocator tuned, as a training run has it."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator().type, 0)
    keep_freed_memory()
    return torch.device("cpu")


def bench_layer(shapes: Sequence[str], dtypes: Sequence[str], rounds: int, json_path: str | None) -> dict[str, float]:
    """Measure, print a table per shape and dtype, write the figures; see DESIGN for their names."""
    figures: dict[str, float] = {}
    for shape in shapes:
        for dtype in dtypes:
            seconds, left_out = measure(shape, dtype, rounds)
            s = SHAPES[shape]
            print(f"\n{shape} {dtype}: T {s.tokens}, D {s.width}, F {s.hidden}, E {s.experts}, K {s.top_k}, {bench_device()}, "
                  f"{torch.get_num_threads()} threads, forward + backward, median of {rounds} interleaved rounds")
            for name, value in sorted(seconds.items(), key=lambda item: item[1]):
                print(f"  {name:<28}{1e3 * value:>10.2f} ms{value / seconds['moedist']:>8.2f}x moedist's time")
            for text in left_out:
                print(f"  left out: {text}")
            peers = {n: v for n, v in seconds.items() if n not in ("moedist", DENSE, BARE)}
            if peers:
                best = min(peers, key=peers.get)
                figures[f"layer.{shape}.{dtype}.vs_best_peer"] = peers[best] / seconds["moedist"]
                print(f"  layer.{shape}.{dtype}.vs_best_peer {figures[f'layer.{shape}.{dtype}.vs_best_peer']:.2f} ({best})")
            figures[f"layer.{shape}.{dtype}.vs_dense"] = seconds["moedist"] / seconds[DENSE]
            print(f"  layer.{shape}.{dtype}.vs_dense {figures[f'layer.{shape}.{dtype}.vs_dense']:.2f}")
    if bench_device().type != "cpu":
        figures |= _accelerator_over_cpu(rounds)
    write_figures(figures, json_path)
    return figures


def _accelerator_over_cpu(rounds: int) -> dict[str, float]:
    """Speed of the accelerator over this machine's CPU at the poster's 512-2048-512 experts, in bf16."""
    shape, dtype = SHAPES["poster"], torch.bfloat16
    runs = {}
    for device in (bench_device(), torch.device("cpu")):
        layer = build_bench_layer(shape, dtype, device)
        x = torch.randn(1, shape.tokens, shape.width, device=device).to(dtype).requires_grad_()
        runs[device.type] = forward_backward(our_forward(layer, shape.tokens, device),
                                             [*layer.parameters(), *layer.bank.parameters()], x, torch.randn_like(x))
    seconds = interleaved_medians(runs, rounds, device=bench_device())
    ratio = seconds["cpu"] / seconds[bench_device().type]
    print(f"\n512-2048-512, bf16: {bench_device().type} {ratio:.1f}x as fast as the CPU")
    return {"layer.poster.bf16.accelerator_over_cpu": ratio}


def _check_agreement(runs: dict[str, Callable[[], torch.Tensor]], dtype: torch.dtype) -> None:
    ours, (limit, part) = runs["moedist"]().float(), AGREEMENT[dtype]
    for name, run in runs.items():
        per_token = (run().float() - ours).abs().amax(-1) / ours.abs().max()
        agreeing = (per_token <= limit).float().mean().item()
        if agreeing < part:
            raise MoedistError(f"{name} agrees with moedist to {limit:.0e} on {agreeing:.1%} of the tokens only (expected "
                               f"{part:.1%}): the times would not compare the same thing")
