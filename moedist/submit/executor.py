"""submitit's Slurm executor for a text of our own: also heterogeneous jobs, which submitit has not (its issue 1741)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from submitit.core import core, utils
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from moedist.errors import ConfigError
from moedist.submit.queue import QUEUE, numbers_of

REASONS = {  # what Slurm says, and what it means
    "Invalid account or account/partition combination": "the account may not use this partition, or there is no such account; "
                                                        "`sacctmgr show associations user=$USER` lists yours",
    "invalid partition specified": "there is no such partition; `sinfo -s` lists them",
    "Requested node configuration is not available": "no nodes of the partition have what is asked for: too many nodes, "
                                                     "cores, memory or GPUs, or a constraint that none fulfils",
    "Requested time limit is invalid": "the time limit is above the partition's; `sinfo -o '%P %l'` lists the limits",
    "Invalid generic resource": "no nodes have such a gres; `sinfo -o '%P %G'` lists them",
    "Invalid feature specification": "no node has such a feature; `sinfo -o '%P %f'` lists them",
    "Invalid qos specification": "there is no such quality of service, or the account may not use it",
    "Job violates accounting/QOS policy": "a limit of the account or quality of service is reached",
    "Node count specification invalid": "the number of nodes is above what the partition has or allows",
}


class QueueWatcher(SlurmInfoWatcher):
    """submitit's view of jobs, by squeue."""

    def _make_command(self) -> Optional[list[str]]:
        return list(QUEUE) if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        found: dict[str, dict[str, str]] = {}
        for line in text.splitlines()[1:]:
            number, state, nodes, _ = (*line.split("|"), "", "")[:4]
            for single in numbers_of(number):
                found.setdefault(single, {"JobID": single, "State": state, "NodeList": nodes})
        return found


class QueuedJob(SlurmJob):
    """A job whose state comes from squeue."""

    watcher = QueueWatcher(delay_s=10)


class JobExecutor(SlurmExecutor):
    """Submits a text as it is.

    Args:
        folder: of submitit's files, shared with the nodes.
        text: for sbatch.
        tasks: ranks of the job.
    """

    job_class = QueuedJob

    def __init__(self, folder: Path, text: str, tasks: int):
        super().__init__(folder)
        self.text, self.tasks = text, tasks

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.text

    def _num_tasks(self) -> int:
        return self.tasks

    def _submit_command(self, command: str) -> core.Job[Any]:
        try:
            return super()._submit_command(command)
        except utils.FailedJobError as error:
            raise ConfigError(in_plain_words(str(error))) from error

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[core.Job[Any]]:
        """As submitit's, which would make another executor for an array, and lose the text."""
        if len(delayed_submissions) == 1:
            return super()._internal_process_submissions(delayed_submissions)
        self.folder.mkdir(parents=True, exist_ok=True)
        pickles = []
        for i, delayed in enumerate(delayed_submissions):
            delayed.set_timeout(0, self.max_num_timeout)
            pickles.append(self.folder / f"member-{i}.pkl")
            delayed.dump(pickles[-1])
        first = self._submit_command(self._submitit_command_str)
        jobs: list[core.Job[Any]] = []
        for i, pickle in enumerate(pickles):
            jobs.append(self.job_class(folder=self.folder, job_id=f"{first.job_id}_{i}", tasks=list(range(self.tasks))))
            jobs[-1].paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs


def in_plain_words(text: str) -> str:
    """Slurm's refusal, and what it means.

    >>> in_plain_words("sbatch: error: Batch job submission failed: Node count specification invalid")
    'Slurm refuses the job: Node count specification invalid (the number of nodes is above what the partition has or allows)'
    """
    for reason, meaning in REASONS.items():
        if reason.lower() in text.lower():
            return f"Slurm refuses the job: {reason} ({meaning})"
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    said = lines[-1].removeprefix("sbatch: error: ") if lines else " ".join(text.split())
    return f"Slurm refuses the job: {said}"
