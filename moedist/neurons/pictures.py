"""Pictures of what `moedist inspect` finds. Imported when they are asked for: matplotlib takes a second.

Colours are told apart in every kind of colour vision: the two of Okabe & Ito, "cividis" for amounts, and orange against
purple for differences.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: draws with Agg, into files, and keeps nothing open
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from moedist.neurons.facts import OVERLAPS

Facts = Mapping[str, Any]
KEPT, DROPPED, LINE = "#0072B2", "#E69F00", "#333333"
DPI = 130
MOST_LABELS = 16  # beyond, numbers in cells are too small to read


def draw(found: Facts, folder: Path) -> list[Path]:
    """Write all pictures into a folder, which is made if need be; returns their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{Path(found['run']).name}, step {found['step']}"
    figures = {"widths": widths(found, title), "fisher": fisher(found, title), "routing": routing(found, title)}
    for name, words in OVERLAPS.items():
        of_name = [o for o in found["overlap"] if o["what"] == name and o["mean"] is not None]
        if of_name:
            figures[f"overlap-{name.replace('_', '-')}"] = overlap(of_name, words, title)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI, bbox_inches="tight")
    return paths


def draw_compression(experts: Sequence[Facts], folder: Path, title: str) -> list[Path]:
    """Write the pictures of one compression; returns their paths.

    Args:
        experts: what became of each: layer, expert, hidden, hidden_before, and "curve" (see `curve_of`) where neurons were
            chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {"experts": experts}
    figures = {"widths": widths(found, title)}
    if all("curve" in e for e in experts):
        figures["fisher"] = fisher(found, title)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI, bbox_inches="tight")
    return [folder / f"{name}.png" for name in figures]


def widths(found: Facts, title: str) -> Figure:
    """Kept neurons by layer and expert."""
    by_layer = _by_layer(found)
    whole = max(e["hidden_before"] for e in found["experts"])
    amounts = np.array([[e["hidden"] for e in experts] for experts in by_layer.values()])
    figure = Figure((max(5.0, 1.6 + 0.5 * min(amounts.shape[1], 20)), 1.8 + 0.35 * len(by_layer)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(amounts, cmap="cividis", vmin=0, vmax=whole, aspect="auto")
    if amounts.shape[1] <= MOST_LABELS:
        for (i, j), amount in np.ndenumerate(amounts):
            axes.text(j, i, amount, ha="center", va="center", fontsize=8, color="black" if amount > 0.6 * whole else "white")
    axes.set_yticks(range(len(by_layer)), list(by_layer))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"Hidden neurons of each expert: {amounts.sum():,} of {whole * amounts.size:,} kept\n{title}", fontsize=10)
    figure.colorbar(image, label=f"neurons (of {whole})")
    return figure


def fisher(found: Facts, title: str) -> Figure:
    """Fisher scores in falling order, one line an expert, with what was kept and what was dropped."""
    by_layer = _by_layer(found)
    steps = sorted({e["curve"]["step"] for e in found["experts"]} - {None})
    when = f"before the compression at step {', '.join(map(str, steps))}" if steps else "now, nothing dropped"
    figure, panels = _panels(len(by_layer), f"Fisher score of every neuron, {when}\n{title}", sharey=True)
    total = sum(sum(e["curve"]["fisher"]) for e in found["experts"]) or 1.0  # one scale: a global budget cuts at one level
    shown = [f / total for e in found["experts"] for f in e["curve"]["fisher"] if f > 0]
    least = max(min(shown, default=1e-9), 1e-9)
    for axes, (layer, experts) in zip(panels, by_layer.items()):
        for e in experts:
            score = np.maximum(np.array(e["curve"]["fisher"]) / total, least)
            kept, ranks = np.array(e["curve"]["kept"]), np.arange(1, len(score) + 1)
            axes.plot(ranks, score, color=DROPPED, lw=1, zorder=2)
            axes.plot(ranks, np.where(kept, score, np.nan), color=KEPT, lw=1, zorder=3)
            if kept.any() and not kept.all():
                last = int(np.flatnonzero(kept)[-1])
                axes.plot(ranks[last], score[last], "o", color=KEPT, ms=3.5, zorder=4)
        axes.set_yscale("log")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set(xlabel="neurons of an expert, largest first")
        axes.grid(alpha=0.25)
    _left(panels, "share of all Fisher mass shown")
    lines = [Line2D([], [], color=KEPT, marker="o", ms=3.5), Line2D([], [], color=DROPPED)]
    panels[0].legend(lines[:2 if steps else 1], ["kept, to the last one", "dropped"][:2 if steps else 1], fontsize=8,
                     loc="upper right")
    return figure


def routing(found: Facts, title: str) -> Figure:
    """How many of the layer's tokens come to each expert."""
    by_layer = _by_layer(found)
    what = f"Who is routed where, on {found['tokens']:,} validation tokens"
    figure, panels = _panels(len(by_layer), f"{what}\n{title}", sharey=True)
    for axes, (layer, experts) in zip(panels, by_layer.items()):
        shares = [100 * e["frequency"] for e in experts]
        axes.bar([e["expert"] for e in experts], shares, color=KEPT)
        axes.axhline(sum(shares) / len(shares), color=LINE, lw=1, ls="--", label="even")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set(xlabel="expert")
    _left(panels, "% of tokens")
    panels[0].legend(fontsize=8)
    return figure


def overlap(overlaps: Sequence[Facts], words: str, title: str) -> Figure:
    """What pairs of experts have in common above chance (orange) or below (purple), one matrix a layer."""
    figure, panels = _panels(len(overlaps), f"Overlap of {words} between experts\n{title}", square=True)
    matrices = [np.array(o["matrix"]) - o["chance"] for o in overlaps]
    for matrix in matrices:
        np.fill_diagonal(matrix, np.nan)  # an expert and itself
    most = max(*(float(np.nanmax(np.abs(matrix))) for matrix in matrices), *(2 * o["chance_sd"] for o in overlaps), 1e-9)
    colours = colormaps["PuOr_r"].with_extremes(bad="#DDDDDD")
    for axes, o, matrix in zip(panels, overlaps, matrices):
        image = axes.imshow(matrix, cmap=colours, vmin=-most, vmax=most)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_title(f"layer {o['layer']} ({o['size']} of {o['of']}): mean {o['mean']:.3f}\n"
                       f"chance {o['chance']:.3f} \N{PLUS-MINUS SIGN} {o['chance_sd']:.3f}", fontsize=8)
        axes.set(xlabel="expert")
    _left(panels, "expert")
    figure.colorbar(image, ax=panels, label="overlap minus chance", fraction=0.03)
    return figure


def _by_layer(found: Facts) -> dict[int, list[Facts]]:
    by_layer: dict[int, list[Facts]] = {}
    for e in found["experts"]:
        by_layer.setdefault(e["layer"], []).append(e)
    return by_layer


def _panels(count: int, title: str, sharey: bool = False, square: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, up to four in a row; readable on a laptop up to some 16."""
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    size = (max(4.5, 2.6 * columns + 1), (2.6 if square else 2.4) * rows + 0.8)
    figure = Figure(size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    flat = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def _left(panels: Sequence[Axes], label: str) -> None:
    """Label the leftmost axes of every row."""
    for axes in panels:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(label)
