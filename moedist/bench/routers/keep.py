"""The folder of a bench: a file for each router and seed that is done, so that a run which was cut off goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping

from moedist.bench.routers.settings import file_name
from moedist.errors import MoedistError


class Results:
    """Results of routers in FOLDER/results, one JSON file each; trained models of the first seed are in `runs`, FOLDER/runs.

    Args:
        settings: whatever the figures depend on but router and seed, as plain JSON values.

    Raises:
        MoedistError: the folder holds results of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        self.runs = self.folder / "runs"
        self._results = self.folder / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        path, own = self.folder / "settings.json", json.loads(json.dumps(settings))
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            if differences := list(_differences(old, own)):
                raise MoedistError(f"{folder} holds results of other settings ({'; '.join(differences[:3])}); give another "
                                   "--out, or the old settings to go on")
        else:
            _write(path, own)

    def get(self, variant: str, seed: int) -> dict[str, Any] | None:
        """What `put` was given; None where there is nothing, or an error, which is tried again, or its model is gone."""
        path = self._path(variant, seed)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"error": ""}
        gone = "error" in found or (found["folder"] and not (self.runs / found["folder"]).is_dir())
        return None if gone else found

    def put(self, variant: str, seed: int, result: Mapping[str, Any]) -> None:
        """Keep a result; a file is there as a whole or not at all."""
        _write(self._path(variant, seed), {"router": variant, "seed": seed, **result})

    def _path(self, variant: str, seed: int) -> Path:
        return self._results / f"{file_name(variant)}-seed{seed}.json"


def _write(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _differences(old: Any, new: Any, name: str = "") -> Any:
    """Of two JSON values, as `steps was 300, is 80`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} was {old}, is {new}"
