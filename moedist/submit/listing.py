"""`moedist jobs` and `moedist cancel`: what was submitted, and where it stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Mapping, Sequence

from moedist.errors import ConfigError
from moedist.monitor.table import table
from moedist.submit.job_folder import Job, JobFolder, Member
from moedist.submit.queue import Queued, ask_slurm, queued

ENDED = ("DONE", "GIVEN UP", "CANCELLED", "FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "COMPLETED", "GONE")
WORDS = {"done": "DONE", "given up": "GIVEN UP", "cancelled": "CANCELLED"}  # outcomes after which nothing comes


def job_folders(root: str | Path) -> list[JobFolder]:
    """The jobs of `root`/jobs, oldest first."""
    folders = [JobFolder(file.parent) for file in Path(root).glob("jobs/*/job.json")]
    return sorted(folders, key=lambda folder: folder.read().submitted)


def find_job(text: str, root: str | Path = "runs") -> JobFolder:
    """A job by its folder, the folder's name, or Slurm's number.

    Raises:
        ConfigError: there is none.
    """
    for path in (Path(text), Path(root) / "jobs" / text):
        if (path / "job.json").exists():
            return JobFolder(path)
    for folder in reversed(job_folders(root)):
        if text.split("_")[0] in folder.read().numbers:
            return folder
    raise ConfigError(f"no job {text!r} in {Path(root) / 'jobs'}; `moedist jobs` lists them (--folder: of other runs)")


def state_of(job: Job, member: Member, index: int, queue: Mapping[str, Queued]) -> str:
    """Slurm's state of a training, or, once Slurm has forgotten it, what its last life has left."""
    found, lives = queue.get(job.number(index)), member.lives()
    if found is not None and found.active:
        return found.state
    if member.cancelled.exists():
        return "CANCELLED"
    if lives and (word := WORDS.get(lives[-1]["outcome"])):
        return word
    if found is not None:
        return found.state
    return "GONE" if job.numbers else "NOT SUBMITTED"


def show_jobs(root: str | Path, names: Sequence[str] = ()) -> str:
    """A table of jobs: state, step, loss, kinds of nodes."""
    folders = [find_job(name, root) for name in names] or job_folders(root)
    if not folders:
        return f"no jobs in {Path(root) / 'jobs'}; moedist submit CONFIG --cluster PROFILE makes one"
    queue = queued()
    rows, remarks = [], []
    for folder in folders:
        job = folder.read()
        for i, member in enumerate(folder.members()):
            values, found = member.last_metrics(), queue.get(job.number(i))
            lives, state = member.lives(), state_of(job, member, i, queue)
            loss = values.get("train/loss")
            label = folder.path.name + (f"/{i}" if len(job.overrides) > 1 else "")
            rows.append([label, job.number(i), state, str(len(lives) + (state == "RUNNING")),
                         str(values.get("step", "-")), "-" if loss is None else f"{loss:.4f}", ", ".join(job.kinds),
                         found.nodes if found and found.nodes else (lives[-1]["nodes"] if lives else "-")])
            if found is not None and found.state == "PENDING" and found.reason not in ("None", ""):
                remarks.append(f"{label} waits: {found.reason}")
            elif lives and not (found and found.active):
                remarks.append(f"{label}: {lives[-1]['why']}")
    head = ["job", "number", "state", "lives", "step", "loss", "kinds", "nodes"]
    return "\n".join([table(head, rows), *remarks])


def cancel(text: str, root: str | Path = "runs") -> str:
    """Cancel a job; its ranks save a checkpoint first, as far as Slurm's KillWait lets them.

    Returns:
        What was done, in words.
    """
    folder = find_job(text, root)
    job, queue = folder.read(), queued()
    for member in folder.members():  # before Slurm ends them: they are not to come back
        member.cancelled.write_text(f"{time.time()}\n", encoding="utf-8")
    active = [n for n in job.numbers if any(q.active for k, q in queue.items() if k.split("_")[0] == n)]
    if not active:
        return f"{folder.path.name} was not in the queue any more"
    ask_slurm("scancel", *active)
    return (f"cancelled: {folder.path.name} (job {', '.join(active)}); ranks that run save a checkpoint first\n"
            f"to go on: moedist resize {folder.path.name}")
