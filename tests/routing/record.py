"""Record the losses of tiny trainings anew: `python -m tests.routing.record [ROUTER ...]`, all of them where none is named."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from moedist.routing import ROUTERS
from tests.routing.tiny_training import last, record


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or sorted(ROUTERS):
        with tempfile.TemporaryDirectory() as folder:
            found = record(name, Path(folder))
        print(f"{name}: {found['losses'][0]:.3f} to {last(found['losses']):.3f}, bound {found['bound']}, frozen "
              f"{found['frozen']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
