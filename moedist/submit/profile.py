"""A site profile: which nodes of a cluster a job takes, and how Python is found on each kind of them."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Optional

from moedist.config import FileKind, key, load_dataclass
from moedist.errors import ConfigError

FORMS = ("auto", "hetjob", "constraint")
PROFILE = FileKind("a site profile", "slurm/clusters/nvidia.yaml", "moedist submit --help")
SCRIPTS = ("any", "job")  # beside one of each kind's name
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are alike."""

    name: str = key("", "what to call these nodes, such as nvidia: letters, digits and -")
    nodes: int = key(1, "how many")
    min_nodes: Optional[int] = key(None, "with how few the job may come back (null: with all): an ordinary job takes "
                                                  "what there is, a heterogeneous one by moedist resize --fit")
    tasks_per_node: int = key(1, "ranks of a node: one a GPU")
    partition: Optional[str] = key(None, "partition (null: the site's default)")
    constraint: Optional[str] = key(None, "feature that the nodes have, such as a100")
    gres: Optional[str] = key(None, "generic resources of a node, such as gpu:a100:4")
    cpus_per_task: Optional[int] = key(None, "cores of a rank, and its threads")
    memory: Optional[str] = key(None, "memory of a node, such as 200G")
    time: Optional[str] = key(None, "time limit, where it is another than the profile's")
    modules: list[str] = key(list, "environment modules to load")
    venv: Optional[str] = key(None, "folder of a virtual environment to activate")
    container: Optional[str] = key(None, "command that starts a program in a container, such as: apptainer exec --nv x.sif")
    python: Optional[str] = key(None, "interpreter (null: the venv's, or python3)")
    variables: dict[str, str] = key(dict, "environment variables")
    setup: list[str] = key(list, "more shell lines, before Python is started")
    options: dict[str, Any] = key(dict, "more sbatch options, such as exclusive: true")


@dataclass(frozen=True)
class Profile:
    """The file as a whole."""

    kinds: list[NodeKind] = key(list, "the kinds of nodes; rank 0 is on the first")
    form: str = key("auto", "several kinds as: hetjob (a heterogeneous job), constraint (one job in one partition), or auto: "
                            "hetjob")
    account: Optional[str] = key(None, "account to charge")
    qos: Optional[str] = key(None, "quality of service")
    time: str = key("24:00:00", "time limit, as Slurm writes it: minutes, hours:minutes:seconds, days-hours:minutes:seconds")
    signal_s: int = key(300, "seconds before the limit at which ranks are told to save a checkpoint and end")
    requeue: bool = key(True, "whether the job comes back after preemption, a failed node, its time limit or a failure")
    max_restarts: int = key(20, "how often")
    mpi: Optional[str] = key(None, "srun --mpi: pmi2 or pmix, for world.transport=mpi (null: the site's default)")
    interface: Optional[str] = key(None, "network interface of ranks, such as ib0 (null: found)")
    check_python: bool = key(True, "refuse an interpreter that is not to be found here, on the login node")
    srun: list[str] = key(list, "more options of srun")


def read_profile(path: str | Path, nodes: Mapping[str, int] = {}, time: Optional[str] = None,
                 signal_s: Optional[int] = None) -> Profile:
    """A profile, with other numbers of nodes, by kind, another time limit, and another signal ahead of it.

    Raises:
        ConfigError: the file is missing, has an unknown key, or says what cannot be.
    """
    profile = load_dataclass(Profile, path, kind=PROFILE)
    if unknown := set(nodes) - {kind.name for kind in profile.kinds}:
        raise ConfigError(f"{path} has no kind called {', '.join(sorted(unknown))}; it has "
                          f"{', '.join(kind.name for kind in profile.kinds)}")
    kinds = [replace(k, nodes=nodes.get(k.name, k.nodes),
                     min_nodes=min(k.min_nodes, nodes[k.name]) if k.min_nodes and k.name in nodes else k.min_nodes,
                     time=None if time else k.time)
             for k in profile.kinds]
    profile = replace(profile, kinds=[k for k in kinds if k.nodes or k.name not in nodes], time=time or profile.time,
                      signal_s=profile.signal_s if signal_s is None else signal_s)
    _check(profile, str(path))
    return profile


def _check(profile: Profile, path: str) -> None:
    if not profile.kinds:
        raise ConfigError(f"{path} names no nodes; list them under kinds:, see slurm/clusters/")
    names = Counter(kind.name for kind in profile.kinds)
    for name, count in names.items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            raise ConfigError(f"{path}: a kind is called {name!r}; a name has letters, digits and -, such as nvidia")
        if name in SCRIPTS or name.startswith("job-"):
            raise ConfigError(f"{path}: a kind is called {name}, as scripts of a job are; call it otherwise")
        if count > 1:
            raise ConfigError(f"{path}: {count} kinds are called {name}; give each a name of its own")
    if profile.form not in FORMS:
        raise ConfigError(f"{path}: form is {profile.form!r}; choose one of {', '.join(FORMS)}")
    if profile.max_restarts < 0 or profile.signal_s < 1:
        raise ConfigError(f"{path}: max_restarts is {profile.max_restarts} (0 or more), signal_s {profile.signal_s} (above 0)")
    for kind in profile.kinds:
        where = f"{path}: kind {kind.name}"
        for field in ("nodes", "tasks_per_node", "cpus_per_task", "min_nodes"):
            if (value := getattr(kind, field)) is not None and value < 1:
                raise ConfigError(f"{where} has {field}: {value}; it must be 1 or more")
        if kind.min_nodes is not None and kind.min_nodes > kind.nodes:
            raise ConfigError(f"{where} has min_nodes: {kind.min_nodes} above nodes: {kind.nodes}")
        seconds = seconds_of(kind.time or profile.time, where)
        if profile.signal_s >= seconds:
            raise ConfigError(f"{where}: signal_s ({profile.signal_s} s) must be below its time limit "
                              f"({kind.time or profile.time}, {seconds} s)")
        if profile.check_python and kind.container is None and not kind.modules:
            _refuse_missing_python(kind, where)
    if profile.form == "constraint":
        _check_constraint(profile, path)


def _refuse_missing_python(kind: NodeKind, where: str) -> None:
    """Where modules or a container bring the interpreter, only the node can know; it says so then."""
    if kind.venv is not None and not (Path(kind.venv).expanduser() / "bin/python").exists():
        raise ConfigError(f"{where}: there is no Python in its venv {kind.venv} (no bin/python); make it, or set "
                          "check_python: false where only the nodes see it")
    if kind.python is not None and shutil.which(str(Path(kind.python).expanduser())) is None:
        raise ConfigError(f"{where}: there is no interpreter {kind.python}; install it, or set check_python: false where only "
                          "the nodes see it")


def _check_constraint(profile: Profile, path: str) -> None:
    for field in ("partition", "gres", "time", "cpus_per_task", "memory"):
        values = {getattr(kind, field) for kind in profile.kinds}
        if len(values) > 1:
            raise ConfigError(f"{path}: form: constraint is one job, so {field} must be the same for all kinds, not "
                              f"{', '.join(map(str, sorted(values, key=str)))}; use form: hetjob for kinds that differ in it")
    if lacking := [kind.name for kind in profile.kinds if not kind.constraint]:
        raise ConfigError(f"{path}: form: constraint tells kinds apart by a feature; set constraint of {', '.join(lacking)}")
    if len(profile.kinds) == 1:
        raise ConfigError(f"{path}: form: constraint is for several kinds, and there is one; leave form out")


def seconds_of(time: str, where: str = "time") -> int:
    """Seconds of a time limit as Slurm writes it.

    >>> seconds_of("90"), seconds_of("2:30"), seconds_of("1-12"), seconds_of("12:00:00")
    (5400, 150, 129600, 43200)

    Raises:
        ConfigError: it is not one.
    """
    found = TIME.fullmatch(str(time).strip())
    if not found:
        raise ConfigError(f"{where}: {time!r} is not a time limit; write minutes, hours:minutes:seconds or "
                          'days-hours:minutes:seconds, in quotes: "12:00:00"')
    fields = [int(field) for field in found["fields"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (fields + [0, 0])[:3]
        return 86400 * int(found["days"]) + 3600 * hours + 60 * minutes + seconds
    if len(fields) == 1:
        return 60 * fields[0]
    hours, minutes, seconds = [0, *fields][-3:]
    return 3600 * hours + 60 * minutes + seconds
