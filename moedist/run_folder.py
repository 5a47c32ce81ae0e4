"""The folder of a run: what is in it, and how to find one.

    config.yaml     the resolved configuration       metrics.jsonl   one object per logged step or evaluation
    tokenizer.json  the tokenizer                    plans.jsonl     one object per plan, with its first step
    loads.jsonl     rows of every expert, the same   compression-00000100.json   what became of every expert
    ranks.json      what was measured of every rank
    checkpoints/step-00000100/...                    compression-00000100.npz    what became of every neuron, see below
        *.distcp    the tensors, by rank             .metadata, meta.json, hashes.json   index, facts, content hashes

The npz is of the methods that choose whole neurons, and holds what a checkpoint no longer can: `layers.3.experts.17.fisher`
and so on, with the fields of `moedist.neurons.record.NeuronRecord`. Neurons go by their ids before the first compression.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from moedist.config import Config, load_config
from moedist.errors import CheckpointError

STEP_FOLDER = re.compile(r"step-(\d{8})(\.old)?")  # .old: see moedist.checkpoint.retention


class RunFolder:
    """Paths inside a run folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.loads_file = self.path / "loads.jsonl"
        self.plans_file = self.path / "plans.jsonl"
        self.profile_folder = self.path / "profile"
        self.ranks_file = self.path / "ranks.json"
        self.checkpoints = self.path / "checkpoints"

    @classmethod
    def make(cls, folder: str | Path, name: str) -> "RunFolder":
        """A new one, NAME-DATE-TIME in `folder`."""
        stamp, tries = time.strftime("%Y%m%d-%H%M%S"), 0
        path = Path(folder) / f"{name}-{stamp}"
        while path.exists():
            tries += 1
            path = Path(folder) / f"{name}-{stamp}-{tries}"
        path.mkdir(parents=True)
        return cls(path)

    def __str__(self) -> str:
        return str(self.path)

    def config(self, overrides: tuple[str, ...] | list[str] = ()) -> Config:
        """The resolved configuration of the run, with overrides on top.

        Raises:
            CheckpointError: this is not a run folder.
        """
        if not self.config_file.is_file():
            raise CheckpointError(f"{self.path} is not a run folder (it has no config.yaml); give a folder that "
                                  "`moedist train` made, such as runs/quickstart-...")
        return load_config(self.config_file, overrides)

    def compression_file(self, step: int) -> Path:
        """What became of every expert in the compression after `step`."""
        return self.path / f"compression-{step:08d}.json"

    def neurons_file(self, step: int) -> Path:
        """What that compression did to every neuron; absent where its method does not choose whole ones."""
        return self.path / f"compression-{step:08d}.npz"

    def compressions(self) -> list[int]:
        """Steps after which experts were compressed, ascending."""
        return sorted(int(match[1]) for p in self.path.glob("compression-*.json")
                      if (match := re.fullmatch(r"compression-(\d{8})\.json", p.name)))

    def checkpoint(self, step: int) -> Path:
        final = self.checkpoints / f"step-{step:08d}"
        old = final.with_name(final.name + ".old")
        return old if old.is_dir() and not final.is_dir() else final  # killed while it was being replaced

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; those being written are not among them."""
        if not self.checkpoints.is_dir():
            return []
        matches = (STEP_FOLDER.fullmatch(p.name) for p in self.checkpoints.iterdir())
        return sorted({int(m.group(1)) for m in matches if m})

    def newest_first(self) -> list[Path]:
        """The checkpoints, newest first.

        Raises:
            CheckpointError: there is none.
        """
        self.newest()
        return [self.checkpoint(step) for step in reversed(self.steps())]

    def newest(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.path} has no checkpoint yet; it was stopped before the first one "
                                  "(checkpoint.every): start the run again without --resume")
        return self.checkpoint(steps[-1])

    def of_step(self, step: int | None) -> Path:
        """The checkpoint of a step, None: the newest.

        Raises:
            CheckpointError: there is none.
        """
        if step is not None and step not in self.steps():
            raise CheckpointError(f"{self.path} has no checkpoint of step {step}; it has {self.steps()}")
        return self.newest() if step is None else self.checkpoint(step)

    def forget_metrics_after(self, step: int) -> None:
        """Drop metric lines beyond `step`, which a resumed run writes again; a line cut short by a kill goes too."""
        for file in (self.metrics_file, self.loads_file):
            if file.is_file():
                _forget_after(file, step)


def _forget_after(file: Path, step: int) -> None:
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    part = file.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(file)


def find_run(folder: str | Path, name: str) -> RunFolder:
    """The newest run called `name` in `folder` that can be resumed.

    Raises:
        CheckpointError: there is none.
    """
    # a run folder is NAME-DATE-TIME (see moedist.trainer): longer names that start alike are other runs
    candidates = [p for p in Path(folder).glob(f"{name}-*") if re.fullmatch(r"\d{8}-\d{6}(-\d+)?", p.name[len(name) + 1:])]
    for path in sorted(candidates, reverse=True):
        if RunFolder(path).steps():
            return RunFolder(path)
    raise CheckpointError(f"no run called {name!r} with a checkpoint in {folder}/ ({len(candidates)} without one); start it "
                          "without --resume, or name its folder: --resume RUN_FOLDER")
