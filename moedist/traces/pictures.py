"""The picture of `moedist inspect --routing`. Imported when it is asked for: matplotlib takes a second."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot: draws with Agg, into files, and keeps nothing open
from matplotlib.ticker import MaxNLocator

DPI = 130
MOST_PANELS = 16  # beyond, every n-th pair of layers
MOST_LIFT = 3.0  # powers of two


def draw_affinity(found: Mapping[str, Any], path: Path) -> Path:
    """Write the affinity of all pairs of layers as a PNG.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    affinity_figure(found["affinity"], f"{Path(found['run']).name}, step {found['step']}").savefig(path, dpi=DPI,
                                                                                                 bbox_inches="tight")
    return path


def affinity_figure(pairs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A matrix a pair of layers: how many times likelier than otherwise the next layer's expert is, given this layer's."""
    shown = pairs[::-(-len(pairs) // MOST_PANELS)]
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    figure = Figure((2.6 + 2.5 * columns, 1.0 + 2.6 * lines), layout="constrained")
    figure.suptitle(f"Expert of the next layer, given that of this one\n{title}", fontsize=10)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    colours = colormaps["PuOr_r"].with_extremes(bad="#DDDDDD")
    for axes, pair in zip(panels, shown):
        image = axes.imshow(lift(pair), cmap=colours, vmin=-MOST_LIFT, vmax=MOST_LIFT)
        axes.set_title(f"{pair['layer']} to {pair['next']}: {pair['mutual_information']:.2f} bits", fontsize=9)
        axes.set(xlabel=f"expert of layer {pair['next']}", ylabel=f"expert of layer {pair['layer']}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for axes in panels[len(shown):]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(panels), label="times as likely as for all tokens (grey: never)")
    bar.set_ticks(range(-3, 4), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    return figure


def lift(pair: Mapping[str, Any]) -> np.ndarray:
    """[E, N] log2 of P(next | this) / P(next); NaN where that never happens."""
    given = np.array(pair["conditional"])
    share = np.array(pair["share"])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log2(given / share)
    return np.where(np.isfinite(found), found, np.nan)
