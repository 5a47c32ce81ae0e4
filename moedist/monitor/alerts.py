"""What somebody should look at: found from what every step and every logging step knows, on rank 0."""

from __future__ import annotations

import shutil
import statistics
from collections import deque
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from moedist.config import MonitorConfig

WINDOW, LEAST = 64, 16  # losses that a spike is judged by
DEVIATIONS = 6.0  # of the losses before, that a spike is beyond in any case
TIMES = 3  # logging steps in a row that a rank is slow before that is told
LEAST_MS = 1.0  # of expert time a step, below which a rank is never slow: it is all noise


class Alert(NamedTuple):
    """What happened, in one word and in words; `fatal`: the run ends by it."""

    kind: str
    text: str
    fatal: bool = False


class Alerts:
    """Remembers what was told, so that it is told once.

    Args:
        folder: the run folder, whose disk is watched.
    """

    def __init__(self, config: MonitorConfig, folder: Path):
        self.config, self.folder = config, folder
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._dead: set[tuple[int, int]] = set()
        self._slow: dict[int, int] = {}
        self._slow_for: object = None
        self._disk = False

    def loss(self, loss: float) -> Alert | None:
        """A spike: the loss of a step, above the median of those before by `monitor.loss_spike` nats and by far more than
        they vary. The loss of every step must be given."""
        found = None
        if self.config.loss_spike and len(self._losses) >= LEAST:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self._losses)  # as a standard deviation
            if loss > median + max(self.config.loss_spike, DEVIATIONS * spread):
                found = Alert("loss spike", f"loss {loss:.4f}; the median of the {len(self._losses)} steps before is "
                                            f"{median:.4f}")
                self._losses.clear()  # it is told once, and the next is judged by what comes now
        self._losses.append(loss)
        return found

    def dead(self, dead: Mapping[int, Sequence[int]]) -> Alert | None:
        """Experts that died since the last time, by layer."""
        now = {(layer, e) for layer, experts in dead.items() for e in experts}
        new = sorted(now - self._dead)
        self._dead = now
        if not new:
            return None
        names = ", ".join(f"layer {layer} expert {e}" for layer, e in new[:8]) + (", ..." if len(new) > 8 else "")
        return Alert("dead experts", f"{len(new)} without a row for {self.config.dead_after} steps: {names}")

    def slow(self, predicted_W: Sequence[float], actual_W: Sequence[float], names: Sequence[str],
             plan: object = None) -> Alert | None:
        """Ranks whose experts take longer than the plan says, by more than `monitor.slow_rank` times.

        Args:
            predicted_W, actual_W: ms of a step; nothing predicted: nothing is told.
            plan: what tells plans apart; with a new one, all is forgotten.
        """
        if plan != self._slow_for:
            self._slow, self._slow_for = {}, plan
        told = []
        for r, (predicted, actual) in enumerate(zip(predicted_W, actual_W)):
            if predicted > 0 and actual > max(LEAST_MS, self.config.slow_rank * predicted):
                self._slow[r] = self._slow.get(r, 0) + 1
                if self._slow[r] == TIMES:
                    told.append(f"{names[r]}: experts take {actual:.1f} ms a step, {actual / predicted:.1f} times the "
                                f"{predicted:.1f} ms of its plan")
            elif self._slow.get(r, 0) < TIMES:
                self._slow[r] = 0
        return Alert("slow rank", "; ".join(told)) if told else None

    def disk(self, checkpoint_bytes: float = 0.0) -> Alert | None:
        """The disk of the run folder has less room than `monitor.disk_gib`, or than two checkpoints."""
        need = max(self.config.disk_gib * 2**30, 2 * checkpoint_bytes)
        free = shutil.disk_usage(self.folder).free
        was, self._disk = self._disk, free < need
        if not self._disk or was:
            return None
        return Alert("disk almost full", f"{free / 2**30:.2f} GiB free for {self.folder}, {need / 2**30:.2f} GiB wanted "
                                         f"(monitor.disk_gib, or two checkpoints); a checkpoint that does not fit is left out")
