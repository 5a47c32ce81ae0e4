"""`moedist submit`: from a configuration and a site profile to a job in the queue."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Mapping, Optional, Sequence

import yaml

from moedist.config import Config, load_config
from moedist.errors import ConfigError
from moedist.phases import check_training
from moedist.submit.check_task import CheckTask
from moedist.submit.follow import follow, follow_file
from moedist.submit.job_folder import Job, JobFolder
from moedist.submit.listing import state_of
from moedist.submit.profile import Profile, read_profile
from moedist.submit.queue import ask_slurm, queued
from moedist.submit.render import any_script, job_script, node_script
from moedist.submit.shape import Shape, shape_of
from moedist.submit.site import nodes_there, read_site, refuse_impossible
from moedist.submit.task import Task

JOBS = "jobs"  # beside run folders


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


def submit(request: Request, checked: bool = False) -> JobFolder:
    """Submit a training, or, `checked`, what looks at its nodes instead (`moedist.submit.site_check`).

    Raises:
        ConfigError: the configuration or profile cannot be, or Slurm refuses it.
    """
    profile, configs = _read(request)
    if checked:
        profile = replace(profile, signal_s=30, requeue=False, kinds=[replace(kind, time=None) for kind in profile.kinds])
    refuse_impossible(profile, read_site())
    folder = JobFolder.make(Path(configs[0].folder) / JOBS, f"check-{configs[0].name}" if checked else configs[0].name)
    try:
        _write(request, profile, configs, folder)
        return _into_queue(folder, CheckTask if checked else Task)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)  # nothing was submitted
        raise


def dry_run(request: Request) -> str:
    """The text for sbatch, and the scripts of the nodes, without asking Slurm anything or writing anything."""
    profile, configs = _read(request)
    folder = Path(configs[0].folder).absolute() / JOBS / f"{configs[0].name}-DATE-TIME"
    members = len(configs)
    shape = shape_of(profile, configs[0].name, _output(folder, members, profile), members)
    parts = [text for _, text in _texts(profile, shape, configs[0].name, folder, members)]
    return "\n".join([*parts, *(text for _, text in _scripts(profile, shape, folder))])


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
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            os.environ["MOEDIST_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        job = executor.submit(task)
        print(f"{folder}: {shape.tasks} ranks on this machine, training {i + 1} of {len(configs)}", flush=True)
        follow_file(job.paths.stdout, job.done)
        failed += job.exception() is not None
    return failed


def resize(folder: JobFolder, nodes: Optional[Mapping[str, int]] = None) -> JobFolder:
    """Submit a job anew with other numbers of nodes, where it waits or has ended; it goes on from its checkpoint.

    Slurm cannot change the nodes of a heterogeneous job, so it gets another number.

    Args:
        nodes: by kind; None: as many as are idle now, down to each kind's min_nodes.

    Raises:
        ConfigError: it runs, or is a sweep, or cannot be so.
    """
    job, queue = folder.read(), queued()
    member, = members if len(members := folder.members()) == 1 else [None]
    if member is None:
        raise ConfigError(f"{folder} is a sweep of {len(members)} trainings; submit the one you mean by itself")
    state = state_of(job, member, 0, queue)
    if state in ("RUNNING", "COMPLETING", "CONFIGURING"):
        raise ConfigError(f"{folder} is {state}; cancel it first (it saves a checkpoint), then resize it")
    site = read_site()
    profile = read_profile(folder.profile, nodes_there(read_profile(folder.profile), site) if nodes is None else nodes)
    refuse_impossible(profile, site)
    if (found := queue.get(job.number(0))) and found.active:
        ask_slurm("scancel", job.number(0))
    folder.profile.write_text(_profile_text(folder.profile, profile), encoding="utf-8")
    shape = shape_of(profile, job.name, _output(folder.path, 1, profile))
    for name, text in _scripts(profile, shape, folder.path):
        (folder.path / name).write_text(text, encoding="utf-8")
    folder.script.write_text(job_script(profile, shape, job.name, folder.path), encoding="utf-8")
    folder.write(replace(job, kinds=_kinds(profile), tasks=shape.tasks, numbers=[], submitted=time.time()))
    member.cancelled.unlink(missing_ok=True)
    return _into_queue(folder, Task)


# -- parts


def _read(request: Request) -> tuple[Profile, list[Config]]:
    profile = read_profile(request.profile, request.nodes or {}, request.time)
    tasks = sum(kind.nodes * kind.tasks_per_node for kind in profile.kinds)
    configs = []
    for own in request.each:
        configs.append(load_config(request.config, [*request.overrides, *own]))
        check_training(configs[-1], tasks)
    if len({config.name for config in configs} | {config.folder for config in configs}) > 2:
        raise ConfigError("the trainings of a sweep share name= and folder=; leave these two out of --each")
    return profile, configs


def _write(request: Request, profile: Profile, configs: Sequence[Config], folder: JobFolder) -> Shape:
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
                     profile.max_restarts, array=array))
    folder.submitit.mkdir()
    for member in folder.members():
        member.logs.mkdir(parents=True)
    return shape


def _into_queue(folder: JobFolder, task: type[Task] | type[CheckTask]) -> JobFolder:
    from moedist.submit.executor import JobExecutor
    job, tasks = folder.read(), _tasks(folder, task)
    scripts = sorted(folder.path.glob("job*.sh"))
    numbers: list[str] = []
    if len(scripts) == 1:
        executor = JobExecutor(folder.submitit, scripts[0].read_text(encoding="utf-8"), job.tasks)
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


def show(folder: JobFolder, followed: bool) -> None:
    """What was submitted, and, where it is followed, what becomes of it."""
    job = folder.read()
    print(f"submitted: job {', '.join(job.numbers)} ({', '.join(job.kinds)}; {job.tasks} ranks"
          + (f"; {len(job.overrides)} trainings" if len(job.overrides) > 1 else "") + f")\nfolder {folder}\n"
          f"next: moedist jobs, moedist jobs {folder.path.name} --follow, moedist cancel {folder.path.name}", flush=True)
    if followed:
        follow(folder.members()[0], resize)
