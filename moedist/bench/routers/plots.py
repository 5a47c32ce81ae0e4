"""Pictures of the comparison: balance against perplexity, tokens a second, stability, and the poster's numbers beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moedist.bench.routers.measures import COMPARABLE, MEASURES

if TYPE_CHECKING:
    from moedist.bench.routers.report import Row

BLUE, ORANGE = "tab:blue", "tab:orange"


def write_plots(rows: Sequence["Row"], poster: Mapping[str, Mapping[str, float]], folder: Path) -> list[Path]:
    """Write PNGs into `folder`; the one of the poster only where two of its routers are here. Nothing without rows."""
    if not rows:
        return []
    pictures: dict[str, tuple[Callable[..., Any], tuple[float, float]]] = {
        "balance_perplexity.png": (_balance_perplexity, (8.5, 6)),
        "tokens_per_s.png": (_tokens, (9, 1.8 + 0.3 * len(rows))),
        "stability.png": (_stability, (8, 1.8 + 0.3 * len(rows)))}
    both = [row for row in rows if row.variant in poster]
    if len(both) > 1:
        pictures["poster.png"] = (lambda figure, _: _poster(figure, both, poster), (15, 3.6))
    paths = []
    for name, (draw, size) in pictures.items():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, rows)
        figure.savefig(folder / name, dpi=150)
        paths.append(folder / name)
    return paths


def _balance_perplexity(figure: Figure, rows: Sequence["Row"]) -> None:
    axes = figure.subplots()
    for causal, marker, label in ((True, "o", "causal"), (False, "X", "not causal: perplexity is optimistic")):
        of = [row for row in rows if row.causal == causal]
        if of:
            axes.errorbar([row.figures["balance"].mean for row in of], [row.figures["ppl"].mean for row in of],
                          xerr=[row.figures["balance"].std for row in of], yerr=[row.figures["ppl"].std for row in of],
                          fmt=marker, color=BLUE if causal else ORANGE, ecolor="lightgrey", label=label)
    _name(axes, [(row.variant, row.figures["balance"].mean, row.figures["ppl"].mean) for row in rows], 7)
    axes.set_xlabel("load balance (mean over largest rows of an expert)")
    axes.set_ylabel("perplexity, held-out text")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _tokens(figure: Figure, rows: Sequence["Row"]) -> None:
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("train_tps", "generate_tps")):
        of = [row for row in rows if name in row.figures]
        values = [row.figures[name].mean for row in of]
        quartiles = [[abs(row.figures[name].mean - row.figures[f"{name}_{q}"].mean) for row in of] for q in ("q1", "q3")]
        axes.barh([row.variant for row in of], values, xerr=quartiles, color=BLUE, ecolor="grey")
        axes.set_xlabel(f"{MEASURES[name].head} (line: quartiles)")
        _top_down(axes)


def _stability(figure: Figure, rows: Sequence["Row"]) -> None:
    axes = figure.subplots()
    for shift, name, colour, label in ((-0.2, "stability", BLUE, "from late in training to its end"),
                                       (0.2, "stability_noise", ORANGE, "under noise on the input")):
        axes.barh([i + shift for i in range(len(rows))], [row.figures[name].mean for row in rows], height=0.38, color=colour,
                  xerr=[row.figures[name].std for row in rows], ecolor="grey", label=label)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("agreement of routing")
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    _top_down(axes)


def _poster(figure: Figure, rows: Sequence["Row"], poster: Mapping[str, Mapping[str, float]]) -> None:
    for axes, name in zip(figure.subplots(1, len(COMPARABLE)), COMPARABLE):
        points = [(row.variant, poster[row.variant][name], row.figures[name].mean) for row in rows]
        axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o", color=BLUE)
        _name(axes, points, 6)
        axes.set_title(MEASURES[name].head, fontsize=9)
        axes.set_xlabel("poster (not defined there)", fontsize=8)
        axes.margins(0.35, 0.1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ours")


def _name(axes: Axes, points: Sequence[tuple[str, float, float]], size: int) -> None:
    """Names beside points, those of neighbours in height on different sides."""
    for i, (name, x, y) in enumerate(sorted(points, key=lambda point: point[2])):
        axes.annotate(name, (x, y), fontsize=size, xytext=(-5 if i % 2 else 5, -2), textcoords="offset points",
                      ha="right" if i % 2 else "left")


def _top_down(axes: Axes) -> None:
    """The first router on top, names small enough."""
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
