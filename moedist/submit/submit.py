"""`moedist submit`: from a configuration and a site profile to a job in the queue."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Mapping, Optional, Sequence

import yaml

from moedist.config import Config, load_config
from moedist.errors import ConfigError
from moedist.submit.check_task import CheckTask
from moedist.submit.follow import follow, follow_file
from moedist.submit.job_folder import Job, JobFolder, Member
from moedist.submit.listing import checkpoint_in_words, state_of
from moedist.submit.profile import Profile, read_profile
from moedist.submit.queue import ask_slurm, queued
from moedist.submit.render import any_script, job_script, node_script
from moedist.submit.shape import Shape, shape_of
from moedist.submit.site import nodes_there, read_site, refuse_impossible
from moedist.submit.task import Task

JOBS = "jobs"  # beside run folders
CHECK_SIGNAL_S = 30  # ahead of a check's limit: it saves nothing


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        each: overrides of each member of a sweep; one entry without any: no sweep.
        nodes: other numbers of nodes than the profile's, by kind; time: another limit.
    """

    config: str
    overrides: Sequence[str]
    profile: str
    each: Sequence[Sequence[str]] = ((),)
    nodes: Mapping[str, int] | None = None
    time: Optional[str] = None


def submit(request: Request, check: bool = False) -> JobFolder:
    """Submit a training, or, to `check`, what looks at its nodes instead (`moedist.submit.site_check`).

    Raises:
        ConfigError: the configuration or profile cannot be, or Slurm refuses it.
    """
    profile, configs = _read(request, CHECK_SIGNAL_S if check else None)
    if check:
        profile = replace(profile, requeue=False)
    refuse_impossible(profile, read_site())
    folder = JobFolder.make(Path(configs[0].folder) / JOBS, f"check-{configs[0].name}" if check else configs[0].name)
    try:
        _write(request, profile, configs, folder, check)
        return _into_queue(folder, CheckTask if check else Task)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)  # nothing was submitted
        raise


def dry_run(request: Request) -> str:
    """The text for sbatch, and the scripts of the nodes, without asking Slurm anything or writing anything."""
    profile, configs = _read(request)
    folder = Path(configs[0].folder).absolute() / JOBS / f"{configs[0].name}-DATE-TIME"
    members = len(configs)
    shape = shape_of(profile, configs[0].name, _output(folder, members, profile), members)
    texts = [text for _, text in _texts(profile, shape, configs[0].name, folder, members)]
    if members > 1:
        each = [f"# training {i}: {shlex.join(own)}\n" for i, own in enumerate(request.each)]
        texts = [f"{own}{text}" for own, text in zip(each, texts)] if len(texts) > 1 else ["".join(each), *texts]
    return "\n".join([*texts, *(text for _, text in _scripts(profile, shape, folder))])


def run_here(request: Request) -> int:
    """The same training by submitit's local executor, as many ranks on this machine; shows rank 0's log.

    Returns:
        How many trainings failed.
    """
    from submitit.local.local import LocalExecutor
    profile, configs = _read(request)
    folder = JobFolder.make(Path(configs[0].folder) / JOBS, configs[0].name)
    shape = _write(request, profile, configs, folder)
    failed = 0
    for i, (member, task) in enumerate(zip(folder.members(), _tasks(folder))):
        executor = LocalExecutor(folder.submitit)
        executor.update_parameters(tasks_per_node=shape.tasks, timeout_min=10**5, stderr_to_stdout=True)
        os.environ["MOEDIST_JOB"] = str(member.path)
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "WARNING")  # as on Slurm
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            os.environ["MOEDIST_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        job = executor.submit(task)
        print(f"{folder}: {shape.tasks} ranks on this machine, training {i + 1} of {len(configs)}", flush=True)
        follow_file(job.paths.stdout, job.done)
        failed += job.exception() is not None
    return failed


def resize(member: Member, nodes: Optional[Mapping[str, int]] = None, time_limit: Optional[str] = None) -> Member:
    """Submit a training anew, where it waits or has ended, with other numbers of nodes; it goes on from its checkpoint.

    Slurm cannot change the nodes of a heterogeneous job, so it gets another number. One of a sweep becomes a job of its own.

    Args:
        nodes: by kind; None: as many as are idle now, down to each kind's min_nodes.
        time_limit: another than it had.

    Raises:
        ConfigError: it runs, or is done, or cannot be so.
    """
    before, queue = member.folder, queued()
    job, state = before.read(), state_of(member, queue)
    if state in ("RUNNING", "COMPLETING", "CONFIGURING"):
        raise ConfigError(f"{member.label} is {state}; cancel it first (it saves a checkpoint), then resize it")
    if state == "DONE" or job.check:
        what = "was a check, no training" if job.check else "is done: it has trained to its end"
        raise ConfigError(f"{member.label} {what}; submit what you mean anew")
    site = read_site()
    wanted = nodes_there(read_profile(before.profile), site) if nodes is None else nodes
    profile = read_profile(before.profile, wanted, time_limit)
    refuse_impossible(profile, site)
    if (found := queue.get(member.number)) and found.active:
        ask_slurm("scancel", member.number)
    job = replace(job, overrides=[job.overrides[member.index]], kinds=_kinds(profile), numbers=[], submitted=time.time(),
                  array=False)
    folder = JobFolder(member.path)
    if before.path != folder.path:
        shutil.copy(before.config, folder.config)
        folder.submitit.mkdir()
    folder.profile.write_text(_profile_text(before.profile, profile), encoding="utf-8")
    shape = shape_of(profile, job.name, _output(folder.path, 1, profile))
    for name, text in [*_scripts(profile, shape, folder.path), *_texts(profile, shape, job.name, folder.path, 1)]:
        (folder.path / name).write_text(text, encoding="utf-8")
    folder.write(replace(job, form=shape.form, tasks=shape.tasks))
    member.cancelled.unlink(missing_ok=True)
    _into_queue(folder, Task)
    return member


# -- parts


def _read(request: Request, signal_s: Optional[int] = None) -> tuple[Profile, list[Config]]:
    from moedist.phases import check_training  # brings torch, which cancel and resize do not wait for
    profile = read_profile(request.profile, request.nodes or {}, request.time, signal_s)
    tasks = sum(kind.nodes * kind.tasks_per_node for kind in profile.kinds)
    configs, notices = [], {}
    for own in request.each:
        configs.append(load_config(request.config, [*request.overrides, *own]))
        notices |= dict.fromkeys(check_training(configs[-1], tasks))
    if len({config.name for config in configs} | {config.folder for config in configs}) > 2:
        raise ConfigError("the trainings of a sweep share name= and folder=; leave these two out of --each")
    for notice in notices:
        print(f"warning: {notice}", file=sys.stderr, flush=True)
    return profile, configs


def _write(request: Request, profile: Profile, configs: Sequence[Config], folder: JobFolder, check: bool = False) -> Shape:
    """The folder of a job, before it has a number."""
    members, name = len(configs), configs[0].name
    group = [f"monitor.group={folder.path.name}"] if members > 1 and configs[0].monitor.group is None else []
    overrides = [[f"folder={Path(configs[0].folder).absolute()}", *request.overrides, *own, *group] for own in request.each]
    overrides = [[*(o for o in entry[1:] if not o.startswith("folder=")), entry[0]] for entry in overrides]
    shape = shape_of(profile, name, _output(folder.path, members, profile), members)
    shutil.copy(request.config, folder.config)
    folder.profile.write_text(_profile_text(Path(request.profile), profile), encoding="utf-8")
    for file, text in [*_scripts(profile, shape, folder.path), *_texts(profile, shape, name, folder.path, members)]:
        (folder.path / file).write_text(text, encoding="utf-8")
    array = members > 1 and shape.form != "hetjob"
    folder.write(Job(name, _kinds(profile), shape.form, shape.tasks, overrides, time.time(), profile.requeue,
                     profile.max_restarts, array=array, check=check))
    folder.submitit.mkdir()
    for member in folder.members():
        member.logs.mkdir(parents=True)
    return shape


def _into_queue(folder: JobFolder, task: type[Task] | type[CheckTask]) -> JobFolder:
    from moedist.submit.executor import JobExecutor
    job, tasks = folder.read(), _tasks(folder, task)
    numbers: list[str] = []
    if len(tasks) == 1 or job.array:
        executor = JobExecutor(folder.submitit, folder.script.read_text(encoding="utf-8"), job.tasks)
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
        numbers.append(jobs[0].job_id.split("_")[0])
    else:  # Slurm has no arrays of heterogeneous jobs
        for i, task in enumerate(tasks):
            text = (folder.path / f"job-{i}.sh").read_text(encoding="utf-8")
            numbers.append(JobExecutor(folder.submitit, text, job.tasks).submit(task).job_id)
    folder.write(replace(job, numbers=numbers))
    return folder


def _tasks(folder: JobFolder, task: type[Task] | type[CheckTask] = Task) -> list[Task] | list[CheckTask]:
    job = folder.read()
    return [task(str(folder.config), own, job.submitted) for own in job.overrides]


def _texts(profile: Profile, shape: Shape, name: str, folder: Path, members: int) -> list[tuple[str, str]]:
    if members > 1 and shape.form == "hetjob":
        return [(f"job-{i}.sh", job_script(profile, shape, name, folder, members, i)) for i in range(members)]
    return [("job.sh", job_script(profile, shape, name, folder, members))]


def _scripts(profile: Profile, shape: Shape, folder: Path) -> list[tuple[str, str]]:
    scripts = [(f"{kind.name}.sh", node_script(profile, kind)) for kind in profile.kinds]
    return [*scripts, ("any.sh", any_script(folder))] if shape.host_file else scripts


def _output(folder: Path, members: int, profile: Profile) -> str:
    array = members > 1 and (len(profile.kinds) == 1 or profile.form == "constraint")
    return f"{folder}/slurm-{'%A_%a' if array else '%j'}.log"


def _kinds(profile: Profile) -> list[str]:
    return [f"{kind.nodes}x{kind.tasks_per_node} {kind.name}" for kind in profile.kinds]


def _profile_text(origin: Path, profile: Profile) -> str:
    """All keys, so that what a later version's defaults are does not matter."""
    keys = yaml.safe_dump(asdict(profile), sort_keys=False)
    return f"# {shlex.quote(str(origin))} as it was when the job was submitted\n{keys}"


def show(members: Sequence[Member], followed: bool) -> bool:
    """What was submitted, and, where it is followed, what becomes of it.

    Returns:
        False where something was seen to fail.
    """
    folder, resumed = members[0].folder, [member for member in members if member.lives()]
    job, name = folder.read(), members[0].label if len(members) == 1 else folder.path.name
    print(f"submitted: job {', '.join(job.numbers)} ({', '.join(job.kinds)}; {job.tasks} ranks"
          + (f"; {len(members)} trainings" if len(members) > 1 else "") + f")\nfolder {folder}", flush=True)
    if len(members) > 1:
        for member, own in zip(members, job.overrides):
            differ = [text for text in own if any(text not in other for other in job.overrides)]
            print(f"  {member.label} (job {member.number}): {shlex.join(differ)}")
    for member in resumed:
        print(f"{member.label}: {checkpoint_in_words(member)}")
    print(f"next: moedist jobs, moedist jobs {name} --follow, moedist cancel {name}", flush=True)
    return follow(members, resize) if followed else True
