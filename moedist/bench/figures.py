"""The figures of a bench as one flat JSON object, so that anyone can compare runs."""

from __future__ import annotations

import json
from typing import Mapping


def write_figures(figures: Mapping[str, float], path: str | None) -> None:
    """Write {figure: number} to `path`; nothing where no path is given."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(dict(figures), file, indent=1)


def read_figures(path: str) -> dict[str, float]:
    """What `write_figures` wrote."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)
