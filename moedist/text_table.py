"""Tables for a terminal: columns as wide as their widest entry, numbers to the right."""

from __future__ import annotations

from typing import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of aligned text. Numbers come formatted as strings; what looks like one is aligned to the right.

    >>> print(table(["rank", "name"], [["0", "cpu"], ["10", "gpu"]]))
    rank  name
       0  cpu
      10  gpu
    """
    texts = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    right = [all(_is_number(row[i]) for row in texts[1:]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)).rstrip()
                     for row in texts)


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or (text[0] in "+-." and text[1:2].isdigit())
