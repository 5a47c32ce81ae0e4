"""Links for people: a line for every direction."""

from __future__ import annotations

from typing import Sequence

from moedist.links.facts import LinkFacts, speed_text
from moedist.text_table import table


def describe(facts: Sequence[LinkFacts], islands: Sequence[str], hosts: Sequence[str]) -> str:
    """Latency and speed of every direction, with the range over the rounds, and bytes that changed."""
    sizes = sorted({nbytes for f in facts for nbytes in f.seconds})
    rows = []
    for f in facts:
        cells = [f"{1e6 * f.latency_s:,.0f}" if f.seconds else ""]
        for nbytes in sizes[1:]:
            times = sorted(f.seconds.get(nbytes, []))
            cells += [speed_text(nbytes / times[len(times) // 2]) if times else "",
                      f"{speed_text(nbytes / times[-1])}-{speed_text(nbytes / times[0])}" if times else ""]
        rows.append([f.source, f.target, *(f"{of[f.source]} -> {of[f.target]}" for of in (islands, hosts)), *cells,
                     f"{f.checked / 2**20:,.1f}", f"{f.wrong_count:,}"])
    speeds = [cell for nbytes in sizes[1:] for cell in (f"MB/s at {_size(nbytes)}", "range")]
    return table(["from", "to", "islands", "hosts", f"us at {_size(sizes[0])}", *speeds, "MiB checked", "wrong bytes"], rows)


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 2**20 else f"{nbytes >> 10} KiB" if nbytes >= 2**10 else f"{nbytes} B"
