"""What a compression did to neurons, written when it happens: those dropped are gone afterwards.

F neurons before the compression, J kept, K = F - J dropped, S stand-ins. All neurons go by their ids before the first
compression, so records of several compressions of a run fit together.
"""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional

import numpy as np
import torch

from moedist.compress import Calibration, Compressed, CurHybrid, Method
from moedist.compress.cur import JointMethod, stand_ins
from moedist.errors import CheckpointError
from moedist.model.forms import GLOBAL_NAME, expert_prefix

Key = tuple[int, int]  # (layer, expert)
STAND_INS = 3  # kept neurons named for each dropped one


@dataclass(frozen=True)
class NeuronRecord:
    """One expert in one compression; at most 9 F + 8 S K + 4 F bytes.

    Attributes:
        neurons: int32 [F], ids before.
        fisher: float32 [F], sum over tokens of (h_j dL/dh_j)^2.
        kept, dropped: int32 [J] and [K], ids, ascending.
        stand_in: int32 [K, S], ids of the kept neurons that contribute most in place of each dropped one.
        stand_in_weight: float32 [K, S], what part of the dropped neuron's down row each has added to its own.
        explained: float32 [K], share of the dropped neuron's energy that all kept ones restore.
        The last three are None for a method without a least-squares down projection: then nobody stands in.
    """

    neurons: np.ndarray
    fisher: np.ndarray
    kept: np.ndarray
    dropped: np.ndarray
    stand_in: Optional[np.ndarray] = None
    stand_in_weight: Optional[np.ndarray] = None
    explained: Optional[np.ndarray] = None

    @property
    def fisher_kept(self) -> float | None:
        """Share of Fisher mass of the kept neurons; None for an expert without any (no tokens)."""
        total = float(self.fisher.sum(dtype=np.float64))
        return float(self.fisher[np.isin(self.neurons, self.kept)].sum(dtype=np.float64)) / total if total else None


def keeps_neurons(method: Method) -> bool:
    """Whether a method chooses whole neurons."""
    return isinstance(method, (JointMethod, CurHybrid))


def record_of(method: Method, calibration: Calibration, new: Compressed,
              names: Optional[torch.Tensor] = None) -> NeuronRecord:
    """The record of an expert that `method` has made `new`.

    Args:
        calibration: with `fisher`, and with `hidden_moment` where the method has a least-squares down projection.
        names: int [F], ids of the neurons before; None: 0 .. F - 1.
    """
    ids = np.arange(new.hidden, dtype=np.int32) if names is None else names.cpu().numpy().astype(np.int32)
    kept = torch.arange(new.hidden) if new.neurons is None else new.neurons.cpu().long()
    dropped = np.delete(np.arange(new.hidden), kept.numpy())
    record = NeuronRecord(ids, calibration.fisher.cpu().numpy().astype(np.float32), ids[kept.numpy()], ids[dropped])
    if not getattr(method, "least_squares", True):
        return record
    found = stand_ins(calibration.hidden_moment, kept.to(calibration.hidden_moment.device), method.ridge, STAND_INS)
    return dataclasses.replace(record, stand_in=ids[found.positions.cpu().numpy()],
                               stand_in_weight=found.weights.cpu().numpy().astype(np.float32),
                               explained=found.explained.cpu().numpy().astype(np.float32))


def write_records(path: Path, records: Mapping[Key, NeuronRecord]) -> None:
    """Write `layers.3.experts.17.kept` and so on to a compressed npz; a file cut short never has the name."""
    arrays = {expert_prefix(*key) + name: array for key, record in sorted(records.items())
              for name, array in vars(record).items() if array is not None}
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)


def read_records(path: Path) -> dict[Key, NeuronRecord]:
    """The inverse of `write_records`.

    Raises:
        CheckpointError: the file is damaged.
    """
    found: dict[Key, dict[str, np.ndarray]] = {}
    try:
        with np.load(path) as arrays:
            for name in arrays.files:
                match = GLOBAL_NAME.fullmatch(name)
                found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = arrays[name]
        return {key: NeuronRecord(**fields) for key, fields in found.items()}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to inspect the run without what it tells of "
                              "dropped neurons") from error


def history(records: Mapping[int, Mapping[Key, NeuronRecord]], key: Key, now: np.ndarray,
            ) -> list[tuple[int, NeuronRecord]]:
    """(step, record) of the compressions that led to an expert with the neurons `now`, the first one first.

    A file may be of a compression that the checkpoint has not seen: written at the step of a checkpoint from right before
    it, or left over where a run was resumed from an earlier step with another schedule. The last record must have kept
    `now`, and each one before it what the next one found.

    Args:
        records: step -> records, of files up to the checkpoint's step.
        now: ids of the neurons that the expert has, ascending.
    """
    found: list[tuple[int, NeuronRecord]] = []
    for step in sorted(records, reverse=True):
        record = records[step].get(key)
        if record is not None and np.array_equal(record.kept, now):
            found.append((step, record))
            now = record.neurons
    return found[::-1]
