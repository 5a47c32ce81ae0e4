"""A training over a slow link: islands that share, round and overlap rows, against every row by itself.

The link is real: two ranks in network namespaces of this machine, joined by a veth pair that tc shapes; or, under a launcher,
whatever is between two ranks. Both trainings start from the same weights, see the same tokens and go on in turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import replace
from typing import Any

from moedist.bench.figures import read_figures, write_figures
from moedist.bench.shaped_link import ShapedLink, end_all, lacking
from moedist.bench.sides import Side
from moedist.config import config_from_dict
from moedist.coordinator import written_plan
from moedist.errors import MoedistError
from moedist.rendezvous.launch import find_launch
from moedist.text_table import table
from moedist.trainer import build_run
from moedist.world import World

PREFIX = "dispatch.islands"
BITS_PER_S = 1e9
# fine-grained experts: 8 of 32 narrow ones for a token, so that rows are wide against what is computed of them
CONFIG: dict[str, Any] = {
    "name": "link", "data": {"tokenizer": "byte", "sequence_length": 128, "max_documents": 300},
    "model": {"layers": 2, "width": 512, "heads": 8, "kv_heads": 2, "experts": 32, "top_k": 8, "expert_hidden": 32},
    "train": {"batch": 16, "lr": 1e-4, "warmup_steps": 20, "eval_tokens": 128},
    "placement": {"planner": "equal", "replan_every": 0},
    "world": {"device": "cpu", "transport": "islands", "islands": [0, 1]},
    "monitor": {"wandb": "disabled"}, "checkpoint": {"every": 0},
}
SIDES = {"plain": ["dispatch.overlap=false", "dispatch.dedup=none"],
         "islands": ["dispatch.dedup=island", "dispatch.cross_dtype=int8", "dispatch.cross_dtype_backward=int8"]}
WARMUP = 2


def bench_slow_link(steps: int, json_path: str | None) -> dict[str, float]:
    """Measure and print; makes the link and starts its two ranks itself unless it runs under a launcher.

    Args:
        steps: measured steps of each training.

    Returns:
        `dispatch.islands.step_speedup_1gbit` (not `_1gbit` under a launcher: there the link is what it is), milliseconds and
        megabytes of a step of both; nothing where namespaces cannot be made, which is said.

    Raises:
        MoedistError: started on other than one or two ranks, or a rank failed.
    """
    launch = find_launch()
    if launch.size == 1:
        return _start_ranks(steps, json_path)
    if launch.size != 2:
        raise MoedistError(f"bench link joins two ranks, but was started on {launch.size}")
    with World.start(config_from_dict(CONFIG).world) as world, tempfile.TemporaryDirectory() as folder:
        folder = world.broadcast_object(folder)
        worlds = {"plain": replace(world, groups=None, transport=world.carrier), "islands": world}
        sides = {name: Side(_build(worlds[name], folder, name)) for name in SIDES}
        for step in range(WARMUP + steps):
            for name in sorted(sides, reverse=bool(step % 2)):
                sides[name].step(worlds[name], measured=step >= WARMUP)
        figures = _figures(sides)
        if world.is_main:
            _show(sides, figures)
            write_figures(figures, json_path)
        return figures


def _start_ranks(steps: int, json_path: str | None) -> dict[str, float]:
    if reason := lacking():
        print(f"\nno training over a link of 1 Gbit/s: {reason}")
        return {}
    command = [sys.executable, "-m", "moedist", "bench", "link", "--steps", str(steps)]
    with ShapedLink() as link, tempfile.TemporaryDirectory() as folder:
        for end in range(2):
            link.shape(end, BITS_PER_S)
        path = f"{folder}/figures.json"
        ranks = [link.start(r, [*command, "--json", path], r, 2) for r in range(2)]
        if code := end_all(ranks):
            raise MoedistError(f"the ranks ended with exit code {code}; what they said stands above")
        figures = read_figures(path)
    figures[f"{PREFIX}.step_speedup_1gbit"] = figures.pop(f"{PREFIX}.step_speedup")
    write_figures(figures, json_path)
    return figures


def _build(world: World, folder: str, name: str):
    config = config_from_dict(CONFIG, [*SIDES[name], f"name={name}", f"folder={folder}"])
    return build_run(config, world, written_plan(config, world.size, None)[0])


def _figures(sides: dict[str, Side]) -> dict[str, float]:
    step_s = {name: statistics.median(side.seconds) for name, side in sides.items()}
    figures = {f"{PREFIX}.step_speedup": step_s["plain"] / step_s["islands"]}
    for name, side in sides.items():
        figures |= {f"{PREFIX}.{name}_step_ms": 1e3 * step_s[name], f"{PREFIX}.{name}_row_mb": _row_bytes(side) / 1e6}
    return figures | {f"{PREFIX}.max_loss_diff": max(abs(a - b) for a, b in zip(*(side.losses for side in sides.values())))}


def _row_bytes(side: Side) -> float:
    return statistics.median(sum(t.bytes for t in r.times.links.values()) for r in side.reports)


def _show(sides: dict[str, Side], figures: dict[str, float]) -> None:
    config, some = next(iter(sides.values())).run.config, next(iter(sides.values()))
    m, tokens = config.model, config.train.batch * config.data.sequence_length
    print(f"\ntwo ranks, one at either end of the link; {tokens // 2:,} tokens each, width {m.width}, {m.layers} layers of "
          f"{m.experts} experts of {m.expert_hidden}, {m.top_k} a token; medians of {len(some.seconds)} steps, in turn; as "
          "rank 0 sees it")
    rows = []
    for name, side in sides.items():
        experts, dense, rows_wait = (1e3 * statistics.median(of(r.times) for r in side.reports) for of in (
            lambda t: sum(t.expert_s.values()), lambda t: t.dense_s, lambda t: sum(x.wait_s for x in t.links.values())))
        step = figures[f"{PREFIX}.{name}_step_ms"]
        rows.append([name, *(f"{ms:,.0f}" for ms in (step, experts, dense, rows_wait, step - experts - dense - rows_wait)),
                     f"{_row_bytes(side) / 1e6:.1f}", f"{side.losses[-1]:.4f}"])
    print(table(["rows", "step ms", "experts", "other compute", "wait for rows", "counts, gradients, other rank",
                 "MB of rows sent", "last loss"], rows))
    for name, value in figures.items():
        print(f"  {name} {value:.3g}")
