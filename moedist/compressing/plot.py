"""The picture of a sweep: how far perplexity rises over the uncompressed model against bytes, a line a method."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Sequence

MARKERS = "osD^vP*Xhd<>p"
LEAST = 0.01  # percent: less, or a fall, is drawn there


class _Point(Protocol):
    method: str
    ratio: float
    ppl_ratio: float
    bytes: int


def plot_sweep(points: Sequence[_Point], base: float, title: str, path: Path) -> None:
    """Write a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(p.method for p in points))
    colours = matplotlib.colormaps["tab10"].colors
    for i, name in enumerate(names):
        own = sorted((p for p in points if p.method == name), key=lambda p: p.bytes)
        # ten colours; beyond, the same ones with dashes and other markers
        axes.plot([p.bytes / 2**20 for p in own], [max(LEAST, 100 * (p.ppl_ratio - 1)) for p in own],
                  marker=MARKERS[i % len(MARKERS)], color=colours[i % 10], linestyle="-" if i < 10 else "--",
                  linewidth=2.4 if i == 0 else 1.3, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g} %")
    axes.set_xlabel("experts, MiB (index vectors included)")
    axes.set_ylabel(f"rise of perplexity over {base:.2f}, uncompressed")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
