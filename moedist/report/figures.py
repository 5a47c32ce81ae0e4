"""The plots of a report, as Plotly figures: {"data": traces, "layout": ...}. Colours of text and background are the page's.

The x-axis is training tokens. Colours of lines are told apart in every kind of colour vision, on white and on black.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, NamedTuple, Sequence

from moedist.report.read import RunData

Figure = dict[str, Any]
COLOURS = ("#3b8fd4", "#e58a00", "#2ca27a", "#c96aa8", "#8f8f9a", "#b5a42e")
COMPUTE, DENSE, TRAVEL, WAIT = "#3b8fd4", "#7db8e8", "#e58a00", "#9a9aa4"
MOST_MARKS = 40  # vertical lines of a plot


class Plot(NamedTuple):
    """A figure with its place on the page: an id, a title, what it shows and how it is read."""

    id: str
    title: str
    text: str
    figure: Figure


def overview(runs: Sequence[RunData]) -> list[Plot]:
    """Plots that show all runs together."""
    marks = runs[0] if len(runs) == 1 else None
    plots = [
        Plot("loss", "Loss", "Cross entropy in nats per token: training (line) and validation (points)."
             + (" Dotted: another plan. Dashed: a compression." if marks else ""),
             _curves(runs, {"train/loss": "train", "valid/loss": "validation"}, "nats per token", marks=marks)),
        Plot("perplexity", "Perplexity", "exp of the loss, on a logarithmic axis.",
             _curves(runs, {"train/perplexity": "train", "valid/perplexity": "validation"}, "perplexity", log=True,
                     marks=marks)),
        Plot("throughput", "Tokens per second", "Against the bound: all work at the sum of the ranks' measured speeds, nobody "
             "waits and rows travel in no time.",
             _curves(runs, {"perf/tokens_per_s": "measured", "perf/tokens_per_s_bound": "bound"}, "tokens/s", marks=marks,
                     zero=True)),
    ]
    return [plot for plot in plots if plot.figure["data"]]


def details(run: RunData, suffix: str = "") -> list[Plot]:
    """Plots of one run; `suffix` tells their ids from those of other runs. Those without anything to show are left out."""
    plots = [
        Plot("ranks", "Where the time of a step goes", "Of every rank, at the last metrics. All-to-all is also where a rank "
             "waits for the rows of slower ones; waiting is for them in all other collectives.", rank_bars(run)),
        Plot("shares", "Load share against speed share", "A point a rank, at the last metrics; on the diagonal it has what "
             "its speed is worth.", shares(run)),
        Plot("balance", "Balance", "1 is perfect. Experts: largest over mean rows. Ranks: largest rows over speed, over all "
             "rows over all speeds. Time: expert time of the slowest rank over the bound.",
             _curves([run], {"moe/load_imbalance": "experts", "moe/rank_imbalance": "ranks",
                             "perf/expert_over_bound": "time"}, "over perfect", marks=run)),
        Plot("loads", "Rows of every expert over time", "Over the mean of its layer. Vertical lines: another plan.",
             loads(run)),
        Plot("plan", "Plan at the start and now", "The rank that each expert is on; of copies, the first.", plans(run)),
        Plot("compression", "What compression kept", "Hidden neurons of each expert after the last compression.", kept(run)),
        Plot("phases", "Compression phases", "Bytes of all experts before and after every compression.", phases(run)),
        Plot("routing", "Routing", "Share of routed pairs that are the same as at the evaluation before, and experts that "
             "have long had no row.",
             _curves([run], {"moe/routing_stability": "stability", "moe/dead_experts": "dead experts"}, "", marks=run)),
        Plot("traffic", "Rows between ranks", "Bytes of rows sent in a step, forward and backward.",
             _curves([run], {"comm/own_island_bytes": "inside islands", "comm/other_islands_bytes": "between islands"},
                     "bytes", marks=run, zero=True)),
    ]
    return [plot._replace(id=plot.id + suffix) for plot in plots if plot.figure["data"]]


def _curves(runs: Sequence[RunData], names: Mapping[str, str], unit: str, log: bool = False, marks: RunData | None = None,
            zero: bool = False) -> Figure:
    """Metrics over tokens. One run: a colour a metric; several: a colour a run, a dash a metric."""
    data = []
    for i, run in enumerate(runs):
        for j, (name, label) in enumerate(names.items()):
            series = run.series(name)
            if not series.values:
                continue
            points = name.startswith("valid/") or len(series.values) == 1
            colour = COLOURS[(j if len(runs) == 1 else i) % len(COLOURS)]
            data.append({
                "type": "scatter", "mode": "lines+markers" if points else "lines", "x": series.tokens, "y": series.values,
                "name": label if len(runs) == 1 else f"{run.name}, {label}", "customdata": series.steps, "meta": name,
                "line": {"color": colour, "width": 1.6, "dash": "dot" if j and len(runs) > 1 else "solid"},
                "marker": {"size": 5, "color": colour},
                "hovertemplate": f"%{{y:.5g}} {unit}<br>step %{{customdata}}<extra>{label}</extra>"})
    layout: Figure = {"xaxis": {"title": {"text": "training tokens"}, "rangemode": "tozero"},
                      "yaxis": {"title": {"text": unit}},
                      "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}
    if log:
        layout["yaxis"] |= {"type": "log", "tickvals": log_ticks([y for trace in data for y in trace["y"]])}
    if zero:
        layout["yaxis"]["rangemode"] = "tozero"
    if marks is not None:
        layout["shapes"] = _marks(marks)
    return {"data": data, "layout": layout}


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around values above 0; Plotly's own are too small to read between those powers.

    >>> log_ticks([15, 120])
    [10.0, 20.0, 50.0, 100.0, 200.0]
    """
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [digit * 10.0**power for power in range(low, high + 1) for digit in (1, 2, 5)]
    first = max((i for i, tick in enumerate(ticks) if tick <= min(values)), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= max(values)), default=len(ticks) - 1)
    return ticks[first:last + 1]


def _marks(run: RunData, compressions: bool = True) -> list[Figure]:
    """Vertical lines where the plan changed, and where experts were compressed."""
    steps = [(step, "dot") for step in run.replans()[-MOST_MARKS:]]
    steps += [(c["step"], "dash") for c in run.compressions] if compressions else []
    return [{"type": "line", "xref": "x", "yref": "paper", "x0": run.tokens_of(step), "x1": run.tokens_of(step), "y0": 0,
             "y1": 1, "line": {"color": WAIT, "width": 1, "dash": dash}} for step, dash in steps]


def rank_bars(run: RunData) -> Figure:
    """Stacked bars of every rank (or quantile): experts, other computing, all-to-all, waiting; ms of a step."""
    labels = run.rank_labels
    parts = {"experts": ("expert_ms", COMPUTE), "other computing": ("dense_ms", DENSE),
             "all-to-all": ("all_to_all_ms", TRAVEL), "waiting": ("wait_ms", WAIT)}
    data = [{"type": "bar", "orientation": "h", "name": name, "y": [_rank(label) for label in labels],
             "x": [run.last(f"rank/{label}/{key}") for label in labels], "marker": {"color": colour}, "meta": key,
             "hovertemplate": "%{x:.1f} ms<extra>%{y}: " + name + "</extra>"} for name, (key, colour) in parts.items()]
    return {"data": data if labels else [], "layout": {
        "barmode": "stack", "xaxis": {"title": {"text": "ms of a step"}},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "height": max(260, 120 + 24 * len(labels))}}


def shares(run: RunData) -> Figure:
    """Each rank's share of all expert rows over its share of all measured speed."""
    labels = [label for label in run.rank_labels if label.isdigit()]  # quantiles of single numbers make no points
    rows, speeds = ([run.last(f"rank/{label}/{name}") or 0.0 for label in labels] for name in ("rows", "rows_per_s"))
    if not labels or not sum(rows) or not sum(speeds):
        return {"data": [], "layout": {}}
    x, y = [s / sum(speeds) for s in speeds], [n / sum(rows) for n in rows]
    most = 1.1 * max(*x, *y)
    return {"data": [
        {"type": "scatter", "mode": "lines", "x": [0, most], "y": [0, most], "hoverinfo": "skip", "name": "fair",
         "line": {"color": WAIT, "width": 1, "dash": "dash"}},
        {"type": "scatter", "mode": "markers+text", "x": x, "y": y, "text": labels, "textposition": "top center",
         "name": "ranks", "marker": {"size": 10, "color": COMPUTE},
         "hovertemplate": "rank %{text}: %{y:.1%} of rows, %{x:.1%} of speed<extra></extra>"}],
        "layout": {"xaxis": {"title": {"text": "share of all speed"}, "tickformat": ".0%", "range": [0, most]},
                   "yaxis": {"title": {"text": "share of all rows"}, "tickformat": ".0%", "range": [0, most]},
                   "showlegend": False}}


def loads(run: RunData) -> Figure:
    """Heat map of rows over their layer's mean, expert over time; a menu chooses the layer."""
    layers = sorted({layer for _, of in run.loads for layer in of})
    data = []
    for layer in layers:
        found = [(step, of[layer]) for step, of in run.loads if layer in of and sum(of[layer])]
        columns = [[n * len(load) / sum(load) for n in load] for _, load in found]
        data.append({"type": "heatmap", "x": [run.tokens_of(step) for step, _ in found],
                     "y": list(range(len(columns[0]))) if columns else [], "z": [list(row) for row in zip(*columns)],
                     "colorscale": "Cividis", "zmin": 0, "visible": layer == layers[0], "name": f"layer {layer}",
                     "meta": layer, "colorbar": {"title": {"text": "over mean", "side": "right"}, "thickness": 10},
                     "hovertemplate": "expert %{y}: %{z:.2f} times the mean<extra></extra>"})
    menu = {"buttons": [{"label": f"layer {layer}", "method": "update",
                         "args": [{"visible": [other == layer for other in layers]}]} for layer in layers],
            "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "type": "dropdown"}
    return {"data": data, "layout": {
        "xaxis": {"title": {"text": "training tokens"}}, "yaxis": {"title": {"text": "expert"}},
        "shapes": _marks(run, compressions=False), "updatemenus": [menu] if len(layers) > 1 else []}}


def plans(run: RunData) -> Figure:
    """The owner of every expert in the first plan and in the last, one above the other."""
    if not run.plans or not run.plans[0][1].layers:
        return {"data": [], "layout": {}}
    chosen = [run.plans[0], run.plans[-1]] if len(run.plans) > 1 else run.plans[:1]
    ranks, data, layout = chosen[0][1].world_size, [], {}
    scale = [[i / max(ranks, 1) + edge, COLOURS[i % len(COLOURS)]] for i in range(ranks) for edge in (0, 1 / max(ranks, 1))]
    for n, (step, plan) in enumerate(chosen):
        axis, rows = "" if not n else str(n + 1), [f"layer {i}" for i, _ in plan.layers]
        data.append({"type": "heatmap", "z": [[min(owners) for owners in layer.owners] for _, layer in plan.layers],
                     "text": [[" ".join(map(str, owners)) for owners in layer.owners] for _, layer in plan.layers],
                     "texttemplate": "%{text}" if len(plan.layers[0][1].owners) <= 16 else "", "y": rows,
                     "xaxis": f"x{axis}", "yaxis": f"y{axis}", "zmin": -0.5, "zmax": ranks - 0.5, "colorscale": scale,
                     "showscale": False, "xgap": 1, "ygap": 1, "meta": step,
                     "hovertemplate": "%{y}, expert %{x}: rank %{text}<extra>plan of step " + str(step) + "</extra>"})
        top, bottom = (1, 0) if len(chosen) == 1 else ((1, 0.64) if not n else (0.36, 0))
        layout |= {f"xaxis{axis}": {"title": {"text": f"expert (plan of step {step})"}, "anchor": f"y{axis}"},
                   f"yaxis{axis}": {"domain": [bottom, top], "autorange": "reversed", "anchor": f"x{axis}"}}
    return {"data": data, "layout": layout | {"height": 150 + len(chosen) * max(110, 30 * len(chosen[0][1].layers))}}


def kept(run: RunData) -> Figure:
    """Hidden neurons that each expert has after the last compression."""
    if not run.compressions:
        return {"data": [], "layout": {}}
    experts = run.compressions[-1]["experts"]
    by_layer: dict[int, dict[int, Mapping[str, Any]]] = {}
    for e in experts:
        by_layer.setdefault(e["layer"], {})[e["expert"]] = e
    layers = sorted(by_layer)
    z = [[by_layer[i][e]["hidden"] for e in sorted(by_layer[i])] for i in layers]
    return {"data": [{"type": "heatmap", "z": z, "y": [f"layer {i}" for i in layers], "colorscale": "Cividis", "zmin": 0,
                      "zmax": max(e["hidden_before"] for e in experts), "texttemplate": "%{z}" if len(z[0]) <= 16 else "",
                      "colorbar": {"title": {"text": "neurons", "side": "right"}, "thickness": 10}, "xgap": 1, "ygap": 1,
                      "hovertemplate": "%{y}, expert %{x}: %{z} neurons<extra></extra>"}],
            "layout": {"xaxis": {"title": {"text": "expert"}}, "yaxis": {"autorange": "reversed"},
                       "height": max(240, 120 + 30 * len(layers))}}


def phases(run: RunData) -> Figure:
    """Bytes of all experts before and after every compression."""
    labels = [f"{c['compress']['method']}, step {c['step']}" for c in run.compressions]
    data = [{"type": "bar", "name": name, "x": labels, "meta": key,
             "y": [sum(e[key] for e in c["experts"]) / 2**20 for c in run.compressions], "marker": {"color": colour},
             "hovertemplate": "%{y:.2f} MiB<extra>" + name + "</extra>"}
            for name, key, colour in (("before", "bytes_before", WAIT), ("after", "bytes", COMPUTE))]
    return {"data": data if labels else [], "layout": {"barmode": "group", "yaxis": {"title": {"text": "MiB"}}, "legend": {
        "orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}}}


def _rank(label: str) -> str:
    return f"rank {label}" if label.isdigit() else f"{label.removeprefix('p')} % of ranks"
