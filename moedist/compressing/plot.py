"""The picture of a sweep: perplexity over the uncompressed model against bytes, a line a method."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Sequence

MARKERS = "osD^vP*Xhd"


class _Point(Protocol):
    method: str
    ratio: float
    ppl_ratio: float
    bytes: int


def plot_sweep(points: Sequence[_Point], base: float, title: str, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(p.method for p in points))
    for i, name in enumerate(names):
        own = [p for p in points if p.method == name]
        axes.plot([p.bytes / 2**20 for p in own], [p.ppl_ratio for p in own], marker=MARKERS[i % len(MARKERS)],
                  linewidth=2.2 if name.startswith("cur") and name != "cur-matrix" else 1.2, label=name)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    ticks = [t for t in (1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 1000) if t <= 1.5 * max(p.ppl_ratio for p in points)]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("experts, MiB (index vectors included)")
    axes.set_ylabel(f"perplexity / {base:.2f} (uncompressed)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
