"""`monitor.profile`: what every rank does in some steps, as a trace for a viewer and as one table of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile

from moedist.config import profile_steps
from moedist.text_table import table
from moedist.timing import REGIONS, name_regions

if TYPE_CHECKING:
    from moedist.phases.run import Run

MOST_RANKS = 16  # columns of the table on a terminal; the file has all


class Profile:
    """Traces the steps that the configuration names, in this phase."""

    def __init__(self, run: "Run"):
        self._run, self._steps = run, profile_steps(run.config.monitor.profile)
        self._profiler: profile | None = None
        self._traced = 0

    def before_step(self) -> None:
        """A step is about to start."""
        if self._profiler is None and self._run.progress.step + 1 in self._steps:
            kinds = [ProfilerActivity.CPU]
            kinds += [kind for name in ("CUDA", "XPU") if self._run.world.device.type == name.lower()
                      and (kind := getattr(ProfilerActivity, name, None)) is not None]
            name_regions(True)
            self._profiler, self._traced = profile(activities=kinds), 0
            self._profiler.start()

    def after_step(self) -> None:
        """A step is done; after the last one, write what was traced. Every rank must call it."""
        if self._profiler is None:
            return
        self._traced += 1
        if self._run.progress.step + 1 not in self._steps:
            self._profiler.stop()
            name_regions(False)
            self._write(self._profiler)
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        run, folder = self._run, self._run.folder.profile_folder
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank-{run.world.rank}.trace.json.gz"))
        found = {event.key: max(event.cpu_time_total, event.device_time_total) for event in profiler.key_averages()
                 if event.key in REGIONS}
        ranks = run.world.gather_objects({name: found.get(name, 0.0) / 1e3 / self._traced for name in REGIONS})
        text = profile_table(ranks)
        if run.world.is_main:
            (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        last = run.progress.step
        run.recorder.say(f"profile of steps {last - self._traced + 1} to {last}, ms a step; traces for ui.perfetto.dev in "
                         f"{folder}\n{profile_table(ranks[:MOST_RANKS])}")


def profile_table(ranks: list[dict[str, float]]) -> str:
    """ms of every region on every rank, a line a region. Experts are forward and backward; their backward part, and the rows
    that travel then, are in backward too. Where own rows are computed while others travel, the wait for those is in
    combine."""
    return table(["region", *(f"rank {r}" for r in range(len(ranks)))],
                 [[name, *(f"{of[name]:.2f}" for of in ranks)] for name in REGIONS])
