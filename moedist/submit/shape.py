"""The shape of a job: an ordinary one for one kind of nodes, a heterogeneous one or one with a bracket constraint for several.

Ranks are numbered component by component, so rank 0 is on the first node of the first kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence

from moedist.submit.profile import NodeKind, Profile

SIGNAL = "USR2"  # ahead of the time limit; NCCL may take USR1, and there it only saves


@dataclass(frozen=True)
class Component:
    """One set of sbatch options, and what srun starts for it.

    Attributes:
        options: of sbatch, as they are written; True stands for a flag.
        script: name of the kind whose script its ranks start by; None: found on each node by its kind.
        step: options of srun.
    """

    options: tuple[tuple[str, Any], ...]
    script: Optional[str]
    step: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """A job before it has a name.

    Attributes:
        form: job, hetjob or constraint.
        tasks: ranks of the whole job.
        variables: that all ranks need because of the form.
    """

    form: str
    components: tuple[Component, ...]
    tasks: int
    variables: tuple[tuple[str, str], ...]

    @property
    def host_file(self) -> bool:
        """Whether a file says which rank is on which node: tasks per node differ within one job."""
        return self.form == "constraint"


def shape_of(profile: Profile, name: str, output: str, members: int = 1) -> Shape:
    """The shape of a profile's job.

    Args:
        name: of the job.
        output: file for what its batch script says.
        members: of a sweep; several are an array where Slurm can have one.
    """
    kinds, several = profile.kinds, len(profile.kinds) > 1
    form = "job" if not several else "constraint" if profile.form == "constraint" else "hetjob"
    common: list[tuple[str, Any]] = [("job-name", name), ("output", output), ("open-mode", "append")]
    if members > 1 and form != "hetjob":
        common.append(("array", f"0-{members - 1}"))
    tasks = sum(kind.nodes * kind.tasks_per_node for kind in kinds)
    if form == "constraint":
        return Shape(form, (_joint(profile, common, tasks),), tasks, _variables(kinds))
    components = tuple(_component(profile, kind, common if i == 0 else (), i if several else None)
                       for i, kind in enumerate(kinds))
    return Shape(form, components, tasks, _variables(kinds) if several else ())


def _variables(kinds: Sequence[NodeKind]) -> tuple[tuple[str, str], ...]:
    """Slurm's process map lists nodes by name, not by component: MPICH waits for ever where tasks per node differ, unless it
    takes every rank for one on a node of its own."""
    uneven = len({kind.tasks_per_node for kind in kinds}) > 1
    return (("MPIR_CVAR_NOLOCAL", "1"),) if uneven else ()


def _component(profile: Profile, kind: NodeKind, common: Sequence[tuple[str, Any]], group: Optional[int]) -> Component:
    # an ordinary job that may be smaller takes what there is; a hetjob with a range always starts with the least
    smaller = group is None and kind.min_nodes is not None and kind.min_nodes < kind.nodes
    nodes = f"{kind.min_nodes}-{kind.nodes}" if smaller else kind.nodes
    options = [*common, *_options(profile, kind, nodes, kind.tasks_per_node, kind.constraint)]
    step = [*([] if group is None else [f"--het-group={group}"]), f"--ntasks-per-node={kind.tasks_per_node}"]
    return Component(tuple(options), kind.name, tuple(step + _cpus(kind)))


def _joint(profile: Profile, common: Sequence[tuple[str, Any]], tasks: int) -> Component:
    kinds = profile.kinds
    constraint = "[" + "&".join(f"{kind.constraint}*{kind.nodes}" for kind in kinds) + "]"
    options = _options(profile, kinds[0], sum(kind.nodes for kind in kinds), max(kind.tasks_per_node for kind in kinds),
                       constraint)
    step = [f"--ntasks={tasks}", "--distribution=arbitrary", *_cpus(kinds[0])]
    return Component((*common, *options), None, tuple(step))


def _cpus(kind: NodeKind) -> list[str]:
    return [] if kind.cpus_per_task is None else [f"--cpus-per-task={kind.cpus_per_task}"]  # srun does not take sbatch's


def _options(profile: Profile, kind: NodeKind, nodes: Any, tasks_per_node: int,
             constraint: Optional[str]) -> list[tuple[str, Any]]:
    options: dict[str, Any] = {
        "partition": kind.partition, "account": profile.account, "qos": profile.qos, "nodes": nodes,
        "ntasks-per-node": tasks_per_node, "cpus-per-task": kind.cpus_per_task, "constraint": constraint, "gres": kind.gres,
        "mem": kind.memory, "time": kind.time or profile.time, "signal": f"{SIGNAL}@{profile.signal_s}",
        **({"requeue": True} if profile.requeue else {"no-requeue": True}),
        **{name.replace("_", "-"): value for name, value in kind.options.items()}}
    return [(name, value) for name, value in options.items() if value is not None and value is not False]
