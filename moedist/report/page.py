"""The page: a template, the figures as JSON, and Plotly's script, all in one file that asks for nothing from outside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Sequence

import jinja2
from plotly.offline import get_plotlyjs

from moedist.report.figures import Plot, details, overview
from moedist.report.read import RunData
from moedist.report.summary import summary


def _environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.PackageLoader("moedist.report", "templates"), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def content(runs: Sequence[RunData]) -> dict[str, Any]:
    """What changes while a run goes on: `figures` by id, and `body`, the HTML of everything but the plots' insides."""
    if len(runs) == 1:
        groups: list[tuple[str, list[Plot]]] = [("", overview(runs) + details(runs[0]))]
    else:
        groups = [("", overview(runs)), *((run.name, details(run, f"-{i}")) for i, run in enumerate(runs))]
    body = _environment().get_template("body.html.j2").render(
        runs=runs, summary=summary(runs), groups=groups, written=time.strftime("%Y-%m-%d %H:%M:%S"))
    return {"figures": {plot.id: plot.figure for _, plots in groups for plot in plots}, "body": body}


def render(runs: Sequence[RunData], refresh_s: float = 0) -> str:
    """The page as HTML, some 5 MB, nearly all of them Plotly's script.

    Args:
        refresh_s: seconds after which the page asks its server for new content; 0: it never asks for anything.
    """
    found = content(runs)
    return _environment().get_template("page.html.j2").render(
        title=", ".join(run.name for run in runs), body=jinja2.utils.markupsafe.Markup(found["body"]), refresh_s=refresh_s,
        figures=in_script(found["figures"]), plotly=jinja2.utils.markupsafe.Markup(get_plotlyjs()))


def in_script(value: Any) -> Any:
    """JSON that may stand in a <script>: no run's name can end it."""
    return jinja2.utils.htmlsafe_json_dumps(value, dumps=lambda v, **_: json.dumps(v, allow_nan=False, separators=(",", ":")))


def write_report(runs: Sequence[RunData], path: Path) -> None:
    """Write the page; what was there is replaced when it is complete."""
    part = path.with_name(path.name + ".part")
    part.write_text(render(runs), encoding="utf-8")
    part.replace(path)
