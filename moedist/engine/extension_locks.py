"""Locks that a killed process left behind in torch's cache of compiled extensions.

DeepSpeed compiles small operators when they are first used, and torch lets one process compile while others wait for its lock
file to go. A process that is killed meanwhile leaves the file, and every later one waits for ever, without a word.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Callable

OLD_S = 180.0  # such operators compile in half a minute


def remove_old_locks(say: Callable[[str], None], root: Path | None = None, old_s: float = OLD_S) -> list[Path]:
    """Remove lock files that are older than any compilation takes; returns them.

    Args:
        root: folder of compiled extensions (None: where torch has it).
    """
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root  # imports setuptools
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    removed = []
    for lock in root.glob("**/lock"):
        try:
            if time.time() - lock.stat().st_mtime > old_s:
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # another rank was faster, or the compilation is done
            continue
    for lock in removed:
        say(f"removed {lock}: a process that was killed while compiling has left it, and all others would wait for it")
    return removed
