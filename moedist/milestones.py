"""Where the time goes from the start of a run to its first step."""

from __future__ import annotations

import time
from typing import Optional

_start: Optional[float] = None
_passed: list[tuple[str, float]] = []  # what it was, seconds since 1970 at its end


def pass_at(name: str, at: float, since: float) -> None:
    """Something that ended before this process could note it; `since`: where everything began, in seconds since 1970."""
    global _start
    if _start is None:
        _start = since
    _passed.append((name, at))


def passed(name: str) -> None:
    """Something has ended now; the next begins."""
    global _start
    if _start is None:
        _start = _process_start()
    if name not in dict(_passed):
        _passed.append((name, time.time()))


def first_step() -> str:
    """The first step has ended: one line, such as 'first step 9.1 s after the start: 3.0 imports, 0.4 ...'; then none."""
    global _start
    if _start is None or not _passed:
        return ""
    passed("for the step")
    before, parts = _start, []
    for name, at in _passed:
        parts.append(f"{max(0.0, at - before):.1f} {name}")
        before = max(before, at)
    start, _start = _start, None
    _passed.clear()
    return f"first step {before - start:.1f} s after the start: {', '.join(parts)}"


def _process_start() -> float:
    """When this process was started, as far as the system says it."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="utf-8") as file:
            import os
            up = float(file.read().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
