"""A run folder as the report needs it; also one that is being written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from moedist.checkpoint import RunFolder
from moedist.config import Config
from moedist.errors import CheckpointError
from moedist.placement import Plan


@dataclass(frozen=True)
class Series:
    """Values of one metric where it was recorded, with the step and the training tokens read until then."""

    steps: list[int]
    tokens: list[float]
    values: list[Any]

    @property
    def last(self) -> Any:
        return self.values[-1] if self.values else None


@dataclass(frozen=True)
class RunData:
    """What a run folder holds.

    Attributes:
        records: lines of metrics.jsonl.
        loads: (step, rows of every expert [E] by layer) since the line before.
        plans: (first step, plan), one for every plan that was another than that before.
        compressions: contents of compression-STEP.json, ascending.
    """

    path: Path
    config: Config
    records: list[dict[str, Any]]
    loads: list[tuple[int, dict[int, list[int]]]]
    plans: list[tuple[int, Plan]]
    compressions: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """The last step with a record."""
        return max((record["step"] for record in self.records), default=0)

    def series(self, name: str) -> Series:
        """A metric over time; what was not finite is left out."""
        found = [(r["step"], r.get("train/tokens", self.tokens_of(r["step"])), r[name]) for r in self.records
                 if r.get(name) is not None]
        return Series(*(list(column) for column in zip(*found))) if found else Series([], [], [])

    def last(self, name: str) -> Any:
        """The newest value of a metric, None where there is none."""
        return self.series(name).last

    def tokens_of(self, step: int) -> float:
        """Training tokens read until a step."""
        return float(step * self.config.train.batch * self.config.data.sequence_length)

    @property
    def alerts(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "alert" in record]

    @property
    def rank_labels(self) -> list[str]:
        """Numbers of the ranks that have series, ascending; beyond 32 ranks p0, p10 and so on, quantiles over ranks."""
        newest = next((r for r in reversed(self.records) if any(k.startswith("rank/") for k in r)), {})
        labels = {name.split("/")[1] for name in newest if name.startswith("rank/")}
        return sorted(labels, key=lambda label: int(label.removeprefix("p")))

    def replans(self) -> list[int]:
        """Steps after which another plan was taken up."""
        return [step for step, _ in self.plans[1:]]


def read_run(path: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        CheckpointError: it is not a run folder, or has no metrics yet.
    """
    folder = RunFolder(path)
    config = folder.config()
    records = list(_lines(folder.metrics_file))
    if not records:
        raise CheckpointError(f"{folder} has no metrics yet; they come every {config.monitor.log_every} steps "
                              "(monitor.log_every)")
    loads = [(line["step"], {int(i): load for i, load in line["loads"].items()}) for line in _lines(folder.loads_file)]
    compressions = [json.loads(folder.compression_file(step).read_text(encoding="utf-8")) for step in folder.compressions()]
    return RunData(folder.path, config, records, loads, _plans(folder), compressions)


def _plans(folder: RunFolder) -> list[tuple[int, Plan]]:
    found: list[tuple[int, Plan]] = []
    for line in _lines(folder.plans_file):
        plan = Plan.from_json(json.dumps(line["plan"]))
        while found and found[-1][0] > line["step"]:
            found.pop()  # the run went on from a checkpoint before that plan
        if not found or found[-1][1].sha256 != plan.sha256:
            found.append((line["step"], plan))
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file; a last line that is still being written is left out."""
    if not file.is_file():
        return
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue
