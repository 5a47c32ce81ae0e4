"""The scripts of a job, by the templates in slurm/templates."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import jinja2

from moedist.errors import ConfigError
from moedist.submit.profile import NodeKind, Profile
from moedist.submit.shape import Shape

TEMPLATES = Path(__file__).parents[2] / "slurm" / "templates"


def job_script(profile: Profile, shape: Shape, name: str, folder: Path, members: int = 1, member: int | None = None) -> str:
    """The text for sbatch.

    Args:
        folder: of the job.
        members: of the sweep; 1: none. member: of which this job is, where each has a job of its own.
    """
    return _render("job.sh.j2", profile=profile, shape=shape, name=name, folder=folder, members=members, member=member)


def node_script(profile: Profile, kind: NodeKind) -> str:
    """What starts Python on a node of a kind."""
    python = kind.python or ("python" if kind.venv else "python3")
    return _render("node.sh.j2", profile=profile, kind=kind, python=python)


def any_script(folder: Path) -> str:
    """What starts the script of a node's kind, where one step has nodes of several."""
    return _render("any.sh.j2", folder=folder)


def _render(template: str, **values: Any) -> str:
    if not TEMPLATES.is_dir():
        raise ConfigError(f"no templates in {TEMPLATES}: jobs are submitted from the project's folder; install moedist from "
                          "there, with pip install -e")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template(template).render(**values)
