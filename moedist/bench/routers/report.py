"""What the bench found, for people and programs: a Markdown table with its definitions, CSV, flat figures, pictures."""

from __future__ import annotations

import csv
import importlib.resources
import math
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

import yaml

from moedist.bench.routers.measures import COMPARABLE, MEASURES, Spread, written
from moedist.bench.routers.settings import Budget, needs_of
from moedist.config import Config
from moedist.routing import ROUTERS

POSTER_NOTE = ("The poster does not define its measures, nor name its model, text and machine: what can be compared is the "
               "order of the routers. rho is Spearman's rank correlation of the two columns; of eight routers, 0.74 and more "
               "is unlikely to be chance (p < 0.05).")


class Row(NamedTuple):
    """One router: figures over seeds by name, empty where every seed failed, and what failed."""

    variant: str
    figures: Mapping[str, Spread]
    errors: Sequence[str] = ()

    @property
    def causal(self) -> bool:
        return ROUTERS[self.variant.split("+")[0]].causal


def poster() -> dict[str, dict[str, float]]:
    """The poster's numbers by router and figure, from the file beside this one."""
    return yaml.safe_load(importlib.resources.files(__package__).joinpath("poster.yaml").read_text(encoding="utf-8"))


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """`routers.{router}.{figure}`, means over seeds, and `routers.{router}.{figure}_std` where there are several."""
    found = {}
    for row in rows:
        for name, spread in row.figures.items():
            found[f"routers.{row.variant}.{name}"] = spread.mean
            if spread.count > 1:
                found[f"routers.{row.variant}.{name}_std"] = spread.std
    return found


def write_report(rows: Sequence[Row], budget: Budget, config: Config, seconds: float, out: str | None) -> None:
    """Print the report; into `out` write it as table.md, all figures as table.csv, and pictures."""
    text = report(rows, budget, config, seconds)
    print(text)
    if out:
        folder = Path(out)
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
        write_csv(rows, folder / "table.csv")
        from moedist.bench.routers.plots import write_plots  # matplotlib, only when pictures are asked for
        pictures = write_plots([row for row in rows if row.figures], poster(), folder)
        print(f"\nwritten: {', '.join(map(str, (folder / 'table.md', folder / 'table.csv', *pictures)))}; the trained models "
              f"of seed 0 are runs in {folder / 'runs'}")


def report(rows: Sequence[Row], budget: Budget, config: Config, seconds: float) -> str:
    """The whole report in Markdown."""
    parts = [describe(budget, config, seconds), router_table(rows), legend(rows, config)]
    if compared := poster_table(rows):
        parts += [compared, POSTER_NOTE]
    return "\n\n".join(parts)


def describe(budget: Budget, config: Config, seconds: float) -> str:
    """What was trained, in words."""
    m, t = config.model, config.train
    tokens = budget.steps * t.batch * config.data.sequence_length
    data = " ".join(filter(None, (config.data.source, config.data.path, config.data.name)))
    quick = ""
    if budget.name == "quick":
        quick = " **Quick mode: a small model, barely trained; numbers only show that all works.**"
    return (f"Each router from the same weights on the same text ({data}, {config.data.tokenizer}) for {budget.steps} steps, "
            f"{tokens:,} tokens; {m.layers} layers of width {m.width}, {m.experts} experts of {m.expert_hidden}, top_k "
            f"{m.top_k}; {budget.seeds} seed{'s: mean ± standard deviation' if budget.seeds > 1 else ''}; "
            f"the command took {seconds / 60:.1f} minutes.{quick}")


def router_table(rows: Sequence[Row]) -> str:
    """A line a router, a column a figure."""
    shown = [name for name, measure in MEASURES.items() if measure.head]
    lines = [["router", *(MEASURES[name].head for name in shown)]]
    for row in rows:
        name = f"`{row.variant}`" + ("" if row.causal else " \\*")
        cells = [written(figure, row.figures[figure]) if figure in row.figures else "" for figure in shown]
        lines.append([name, *(cells if row.figures else ["failed", *cells[1:]])])
    return markdown(lines)


def legend(rows: Sequence[Row], config: Config) -> str:
    """What failed, what a star means, what some routers need beside `config`, and every column's definition."""
    lines = [f"`{row.variant}`: failed: {error}" for row in rows for error in row.errors]
    if any(not row.causal for row in rows):
        lines.append("\\* not causal: a token's route depends on later tokens of its sequence, so perplexity is optimistic "
                     "and generation differs from training.")
    needs = {name: needs for row in rows if (needs := needs_of(name := row.variant.split("+")[0], config))}
    if needs:
        lines.append("Beside what all have: " + "; ".join(f"`{name}` {' '.join(f'`{n}`' for n in of)}"
                                                          for name, of in needs.items()) + ".")
    lines += [f"- **{m.head}**: {m.text}." for m in MEASURES.values() if m.head]
    return "\n".join(lines)


def poster_table(rows: Sequence[Row]) -> str:
    """The poster's numbers, each with ours behind it; empty where none of its routers is here."""
    theirs, ours = poster(), {row.variant: row.figures for row in rows if row.figures}
    both = [name for name in theirs if name in ours]
    if not both:
        return ""
    lines = [["router: poster, ours", *(MEASURES[figure].head for figure in COMPARABLE)]]
    for name in both:
        lines.append([f"`{name}`", *(f"{theirs[name][figure]:g}, {format(ours[name][figure].mean, MEASURES[figure].form)}"
                                     for figure in COMPARABLE)])
    if len(both) > 2:
        lines.append(["rho", *(_rho([theirs[n][figure] for n in both], [ours[n][figure].mean for n in both])
                               for figure in COMPARABLE)])
    return markdown(lines)


def _rho(a: Sequence[float], b: Sequence[float]) -> str:
    from scipy.stats import spearmanr
    if len(set(a)) < 2 or len(set(b)) < 2:
        return ""  # no order
    return f"{spearmanr(a, b).statistic:+.2f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, the first line its head.

    >>> print(markdown([["a", "b"], ["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(lines[0]), *texts[1:]])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All figures, in their units: a line a router, for every figure its mean and standard deviation over seeds."""
    names = [name for name in MEASURES if any(name in row.figures for row in rows)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["router", "causal", "seeds", "errors", *(n + end for n in names for end in ("", "_std"))])
        for row in rows:
            seeds = max((s.count for s in row.figures.values()), default=0)
            spread = [row.figures.get(n, Spread(math.nan, math.nan, 0)) for n in names]
            writer.writerow([row.variant, row.causal, seeds, "; ".join(row.errors),
                             *(v for s in spread for v in (s.mean, s.std if s.count > 1 else ""))])
