"""The folder of a job: what was submitted, and what became of it, life by life.

    job.json      what was submitted, when, and Slurm's number     profile.yaml, config.yaml   as they were then
    job.sh        the text for sbatch                              KIND.sh                     what starts Python on a node
    submitit/     what ranks are to do, pickled by submitit        slurm-NUMBER.log            what the batch script said
    run           the run folder                                   lives.jsonl                 one object per life that ended
    logs/LIFE-RANK.log                                             done, cancelled             there once it is so
    kinds.txt, hosts.txt                                           of which kind each node is, and where ranks are
    problems.txt                                                   what a check has found, a line each

A sweep has the last five of each member in a folder of its number; a member that was submitted anew by itself has all of them
there, and is a job of its own from then on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from moedist.run_folder import RunFolder
from moedist.errors import ConfigError

ERROR = "moedist: error: "  # as moedist.guard writes it


@dataclass(frozen=True)
class Job:
    """What was submitted.

    Attributes:
        kinds: '2x2 nvidia', '2x1 amd': nodes times ranks of each kind.
        numbers: Slurm's, of the job, or of each member of a sweep of heterogeneous jobs.
        array: whether members are elements of an array.
        requeue, max_restarts: of the profile.
        check: whether it looks at its nodes instead of training.
    """

    name: str
    kinds: list[str]
    form: str
    tasks: int
    overrides: list[list[str]]
    submitted: float
    requeue: bool
    max_restarts: int
    numbers: list[str] = field(default_factory=list)
    array: bool = False
    check: bool = False

    def number(self, member: int) -> str:
        """Slurm's number of a member; empty before it has one."""
        if self.array:
            return f"{self.numbers[0]}_{member}" if self.numbers else ""
        return self.numbers[member] if member < len(self.numbers) else ""


class JobFolder:
    """Paths inside a job's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self.file = self.path / "job.json"
        self.submitit, self.problems = self.path / "submitit", self.path / "problems.txt"
        self.profile, self.config, self.script = self.path / "profile.yaml", self.path / "config.yaml", self.path / "job.sh"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def make(cls, root: str | Path, name: str) -> "JobFolder":
        """A new one: `root`/NAME-DATE-TIME."""
        stem = Path(root) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for tries in range(100):
            path = stem.with_name(stem.name + (f"-{tries}" if tries else ""))
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(path)
        raise ConfigError(f"{stem} and 99 like it are there already; give the run another name=")

    def read(self) -> Job:
        """What was submitted.

        Raises:
            ConfigError: this is not the folder of a job.
        """
        try:
            return Job(**json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self.path} is not the folder of a job ({type(error).__name__}); `moedist jobs` lists "
                              "them") from error

    def write(self, job: Job) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(asdict(job), indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)

    def members(self) -> list["Member"]:
        """The members of its sweep, or itself."""
        count = len(self.read().overrides)
        return [Member(self.path / str(i) if count > 1 else self.path) for i in range(count)]


class Member:
    """What belongs to one training of a job: $MOEDIST_JOB."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.logs, self.lives_file, self.run_file = self.path / "logs", self.path / "lives.jsonl", self.path / "run"
        self.kinds_file, self.hosts_file = self.path / "kinds.txt", self.path / "hosts.txt"
        self.done_file, self.cancelled = self.path / "done", self.path / "cancelled"

    @property
    def folder(self) -> JobFolder:
        """Of its job: its own, or its sweep's."""
        return JobFolder(self.path if (self.path / "job.json").exists() else self.path.parent)

    @property
    def in_sweep(self) -> bool:
        return (self.path.parent / "job.json").exists()

    @property
    def label(self) -> str:
        """NAME-DATE-TIME, in a sweep with its number: NAME-DATE-TIME/1."""
        return f"{self.path.parent.name}/{self.path.name}" if self.in_sweep else self.path.name

    @property
    def index(self) -> int:
        """Its place in its job."""
        return 0 if self.folder.path == self.path else int(self.path.name)

    @property
    def number(self) -> str:
        """Slurm's number of it; empty before it has one."""
        return self.folder.read().number(self.index)

    def batch_logs(self) -> list[Path]:
        """What its batch scripts have said, in jobs of all numbers that it has had."""
        own = list(self.path.glob("slurm-*.log"))
        if self.in_sweep:
            sweep = JobFolder(self.path.parent)
            own.append(sweep.path / f"slurm-{sweep.read().number(int(self.path.name))}.log")
        return sorted((log for log in own if log.exists()), key=lambda log: log.stat().st_mtime)

    def checkpoint(self) -> Optional[int]:
        """Step of its newest checkpoint; None where it has none."""
        run = self.run()
        steps = run.steps() if run is not None else []
        return steps[-1] if steps else None

    def lives(self) -> list[dict[str, Any]]:
        """What became of each life: outcome, step, code, why, seconds since 1970."""
        if not self.lives_file.exists():
            return []
        return [json.loads(line) for line in self.lives_file.read_text(encoding="utf-8").splitlines()]

    def add_life(self, life: dict[str, Any]) -> None:
        with open(self.lives_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(life) + "\n")

    def run(self) -> Optional[RunFolder]:
        """The run folder, once there is one."""
        return RunFolder(self.run_file.read_text(encoding="utf-8").strip()) if self.run_file.exists() else None

    def last_metrics(self) -> dict[str, Any]:
        """The newest line of the run's metrics with a training loss; empty where there is none."""
        run, found = self.run(), {}
        if run is not None and run.metrics_file.exists():
            for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    values = json.loads(line)
                except ValueError:  # cut short by a kill
                    continue
                if "train/loss" in values:
                    found = values
        return found

    def log(self, life: int, rank: int = 0) -> Path:
        return self.logs / f"{life}-{rank}.log"

    def error_of(self, life: int) -> str:
        """What a rank has said of why a life ended; empty where none has."""
        for path in sorted(self.logs.glob(f"{life}-*.log")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(ERROR):
                    return line.removeprefix(ERROR)
        return ""
