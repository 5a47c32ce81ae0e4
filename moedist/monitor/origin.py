"""Where a run comes from: the program's version and commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import moedist


def origin() -> dict[str, str | None]:
    """version, and commit of the source tree with "+" where it has changes; None where it is no git checkout."""
    root = Path(moedist.__file__).parents[1]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = commit and _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"moedist_version": moedist.__version__, "git_commit": f"{commit}+" if changed else commit}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
