"""`moedist jobs` and `moedist cancel`: what was submitted, and where it stands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Mapping, Sequence

from moedist.errors import ConfigError
from moedist.submit.job_folder import JobFolder, Member
from moedist.submit.queue import Queued, ask_slurm, queued
from moedist.text_table import table

ENDED = ("DONE", "GIVEN UP", "CANCELLED", "FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "COMPLETED", "GONE")
WORDS = {"done": "DONE", "given up": "GIVEN UP", "cancelled": "CANCELLED"}  # outcomes after which nothing comes


def job_folders(root: str | Path) -> list[JobFolder]:
    """The jobs of `root`/jobs, oldest first."""
    folders = [JobFolder(file.parent) for file in Path(root).glob("jobs/*/job.json")]
    return sorted(folders, key=lambda folder: folder.read().submitted)


def find_trainings(text: str, root: str | Path = "runs") -> tuple[JobFolder, list[Member]]:
    """A job, and which of its trainings are meant: by its folder, the folder's name, or Slurm's number.

    Args:
        text: NAME-DATE-TIME or 12: all of them; NAME-DATE-TIME/1 or 12_1: one of a sweep.

    Raises:
        ConfigError: there is none.
    """
    for path in (Path(text), Path(root) / "jobs" / text):
        if (path / "job.json").exists():
            folder = JobFolder(path)
            return folder, folder.members()
        if path.name.isdigit() and (path.parent / "job.json").exists():
            folder = JobFolder(path.parent)
            if int(path.name) < len(members := folder.members()):
                return folder, [members[int(path.name)]]
            raise ConfigError(f"{folder.path.name} has {len(members)} training{'s' if len(members) > 1 else ''}, counted from "
                              f"0; there is no {path.name}")
    for folder in reversed(job_folders(root)):
        members = folder.members()
        if folder.read().array and text == folder.read().numbers[0]:
            return folder, members
        if found := [member for member in members if text == member.number]:
            return folder, found
    raise ConfigError(f"no job {text!r} in {Path(root) / 'jobs'}; `moedist jobs` lists them (--folder: of other runs)")


def state_of(member: Member, queue: Mapping[str, Queued]) -> str:
    """Slurm's state of a training, or, once Slurm has forgotten it, what its last life has left."""
    found, lives = queue.get(member.number), member.lives()
    if found is not None and found.active:
        return found.state
    if member.cancelled.exists():
        return "CANCELLED"
    if lives and (word := WORDS.get(lives[-1]["outcome"])):
        return word
    if found is not None:
        return found.state
    return "GONE" if member.number else "NOT SUBMITTED"


def show_jobs(root: str | Path, names: Sequence[str] = ()) -> str:
    """A table of jobs: state, step, newest checkpoint, loss, kinds of nodes."""
    trainings = [find_trainings(name, root)[1] for name in names] or [folder.members() for folder in job_folders(root)]
    if not trainings:
        return f"no jobs in {Path(root) / 'jobs'}; moedist submit CONFIG --cluster PROFILE makes one"
    queue = queued()
    rows, remarks = [], []
    for member in (member for members in trainings for member in members):
        job, values, found = member.folder.read(), member.last_metrics(), queue.get(member.number)
        lives, state, saved = member.lives(), state_of(member, queue), member.checkpoint()
        loss = values.get("train/loss")
        shown = "CHECKED" if job.check and state == "DONE" else state
        rows.append([member.label, member.number, shown, str(len(lives) + (state == "RUNNING")), str(values.get("step", "-")),
                     "-" if saved is None else str(saved), "-" if loss is None else f"{loss:.4f}", ", ".join(job.kinds),
                     found.nodes if found and found.nodes else (lives[-1]["nodes"] if lives else "-")])
        if found is not None and found.state == "PENDING" and found.reason not in ("None", ""):
            remarks.append(f"{member.label} waits: {found.reason}")
        elif job.check and not (found and found.active):
            remarks.append(f"{member.label} was a check, no training; {_result(member.folder)}")
        elif lives and not (found and found.active):
            remarks.append(f"{member.label}: {lives[-1]['why']}")
    head = ["job", "number", "state", "lives", "step", "saved", "loss", "kinds", "nodes"]
    return "\n".join([table(head, rows), *remarks])


def _result(folder: JobFolder) -> str:
    """What a check has found, as `moedist submit --check` left it; where it found nothing, its folder is gone."""
    if not folder.problems.exists():
        return f"moedist submit --check did not wait for its end; what ranks said is in {folder}"
    problems = folder.problems.read_text(encoding="utf-8").splitlines()
    return "\n  ".join([f"it found {len(problems)} problem{'s' if len(problems) > 1 else ''}:", *problems])


def cancel(text: str, root: str | Path = "runs") -> str:
    """Cancel a job, or one training of a sweep; its ranks save a checkpoint first, as far as Slurm's KillWait lets them.

    Returns:
        What was done, in words, and what there is to go on from.
    """
    folder, members = find_trainings(text, root)
    queue = queued()
    for member in members:  # before Slurm ends them: they are not to come back
        member.cancelled.write_text(f"{time.time()}\n", encoding="utf-8")
    active = [member for member in members if (found := queue.get(member.number)) and found.active]
    lines = []
    if active:
        ask_slurm("scancel", *dict.fromkeys(member.number for member in active))
    for member in members:
        if member not in active:
            lines.append(f"{member.label} was not in the queue any more; {checkpoint_in_words(member)}")
        elif queue[member.number].state == "RUNNING":
            lines.append(f"cancelled: {member.label} (job {member.number}), which runs: its ranks save a checkpoint first, "
                         f"where they have begun to train; until then, {checkpoint_in_words(member)}")
        else:
            lines.append(f"cancelled: {member.label} (job {member.number}), which waited; {checkpoint_in_words(member)}")
    to_go_on = " or ".join(f"moedist resize {member.label}" for member in members[:2]) + (" ..." if len(members) > 2 else "")
    return "\n".join([*lines, f"to go on: {to_go_on}"])


def checkpoint_in_words(member: Member) -> str:
    """What a training would go on from."""
    saved = member.checkpoint()
    return "it has no checkpoint, and would start at step 0" if saved is None else f"its newest checkpoint is of step {saved}"
