#!/usr/bin/env python3
"""Submit a training to Slurm: launch/submit.py CONFIG --cluster slurm/clusters/NAME.yaml [KEY=VALUE ...]

The same as `moedist submit`, from the project's folder and with its .venv where no environment with moedist is active.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv" / "bin" / "python"

if any(importlib.util.find_spec(name) is None for name in ("torch", "omegaconf", "submitit")):
    if not VENV.exists() or Path(sys.prefix) == VENV.parents[1]:
        sys.exit("error: moedist is not installed here; launch/quickstart makes .venv, or activate an environment")
    os.execv(VENV, [str(VENV), __file__, *sys.argv[1:]])
sys.path.insert(0, str(ROOT))

from moedist.cli import main  # noqa: E402

main(["submit", *sys.argv[1:]])
