"""What rank 0 says on the terminal: a progress bar on a terminal, plain lines elsewhere, JSON for programs, or little."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Mapping

from tqdm import tqdm

OUTPUTS = ("auto", "plain", "quiet", "json")


def spoken(output: str, text: str) -> str | None:
    """A line for people as an output mode has it; None where it is not to be said."""
    if output == "json":
        return json.dumps({"text": text})
    return text if output != "quiet" or text.startswith(("warning", "done: ", "stopped by")) else None


class Display:
    """One way to speak.

    Args:
        output: auto (a bar on a terminal, beside the lines), plain (lines), quiet (warnings, alerts and how it ended), json (one object a
            line: {"metrics": ...}, {"text": ...} or {"alert": ...}).
        total, first: steps of the run, and where it goes on.
    """

    def __init__(self, output: str, total: int, first: int):
        self.output, self.total = output, total
        self._first, self._started = first, time.monotonic()
        self._paced = False  # from the first step on, which is not like the others, as the start of a run is not
        self._bar: tqdm | None = None
        if output == "auto" and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, leave=False)

    def say(self, text: str) -> None:
        """A line for people; when quiet, only warnings and how the run ended."""
        if (line := spoken(self.output, text)) is not None:
            self._print(line)

    def metrics(self, step: int, values: Mapping[str, Any], line: str | None) -> None:
        """Metrics of a step, and a line that tells them to people."""
        if self.output == "json":
            self._print(json.dumps({"step": step, "metrics": dict(values)}))
        elif line:
            self.say(line)

    def alert(self, step: int, kind: str, text: str) -> None:
        """What somebody should look at, whatever the mode."""
        self._print(json.dumps({"step": step, "alert": kind, "text": text}) if self.output == "json"
                    else f"step {step:>6}  ALERT {kind}: {text}")

    def tick(self, step: int, phase: str, facts: Mapping[str, str]) -> None:
        """A step is done. Move the bar, if there is one: the phase before it, `facts` behind it."""
        if not self._paced:
            self._first, self._started, self._paced = step, time.monotonic(), True
        if self._bar is not None:
            self._bar.set_description_str(phase, refresh=False)
            self._bar.set_postfix_str("  ".join(f"{name} {value}" for name, value in facts.items()), refresh=False)
            self._bar.update(step - self._bar.n)

    def bar(self, **options: Any) -> tqdm:
        """A progress bar for something beside the steps; silent where there is none for the steps."""
        return tqdm(**{**options, "disable": self.output != "auto" or not sys.stderr.isatty()})

    def eta(self, step: int) -> str:
        """Time left at the mean pace since the first step, as h:mm:ss; ?:??:?? before the second."""
        done = step - self._first
        if done <= 0:
            return "?:??:??"
        left = (time.monotonic() - self._started) / done * (self.total - step)
        return f"{int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
