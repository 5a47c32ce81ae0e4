"""`moedist export-hf`: a checkpoint in Hugging Face's format, written by all ranks, each its own experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from moedist.checkpoint import RunFolder
from moedist.config import check_config, for_ranks
from moedist.errors import CheckpointError
from moedist.huggingface.families import Family
from moedist.huggingface.names import dense_pieces, expert_pieces, scatter
from moedist.huggingface.origin import DTYPES, FOLDER, GENERATION, OF_TOKENIZER, TOKENIZER, read_origin
from moedist.huggingface.shards import Part, write_shards
from moedist.huggingface.source import CONFIG
from moedist.huggingface.write_config import choose_family, config_json, generation_json, tokenizer_json
from moedist.model import Bank
from moedist.phases.restore import OpenedRun, open_run
from moedist.world import World, find_launch

SHARD_GIB = 4.0


def export_run(run_folder: str, target: str, overrides: Sequence[str] = (), step: int | None = None, dtype: str = "keep",
               architecture: str | None = None, shard_gib: float = SHARD_GIB) -> list[str]:
    """Write a folder that transformers, and whatever reads its format, can open. Lines to tell, on every rank.

    Args:
        target: a folder that is not there yet, or is empty.
        step: the checkpoint to take (None: the newest).
        dtype: of the weights; "keep": each in that of the model that was imported, else in that of training.
        architecture: a model_type (None: the one that fits).
        shard_gib: size of a file of weights, at most, where no tensor is larger.

    Raises:
        ConfigError: no such architecture computes this. CheckpointError: no run, or a folder that is in use.
    """
    folder, size = RunFolder(run_folder), find_launch().size
    config, _ = for_ranks(folder.config(list(overrides)), size)
    check_config(config, size)
    family = choose_family(config, architecture)
    path = Path(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is in use; give a folder that is not there yet, or is empty")
    with World.start(config.world) as world:
        return export_into(world, folder, open_run(folder, config, world, step), family, path, dtype, shard_gib)


def export_into(world: World, folder: RunFolder, opened: OpenedRun, family: Family, path: Path, dtype: str,
                shard_gib: float) -> list[str]:
    """`export_run` in a world that has started."""
    config, model, part = opened.config, opened.model, path.with_name(path.name + ".part")
    mine = [n for bank in model.banks.values() for n in bank.widths]
    widths = [n for of_rank in world.gather_objects(mine) for n in of_rank]
    hidden, usual, dtype_of = max(widths), *_dtypes(folder, dtype, model.head_weight.dtype)
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    world.barrier()
    parts = [*_expert_parts(opened, family, hidden, dtype_of)]
    if world.is_main:
        parts = [*_dense_parts(opened, family, dtype_of), *parts]
    files, numbers = write_shards(part, parts, int(shard_gib * 2**30), world)
    if world.is_main:
        origin = read_origin(folder, CONFIG)
        found = config_json(config, family, hidden, len(model.head_weight), usual, opened.tokenizer, origin)
        _write(part / CONFIG, found)
        _write(part / GENERATION, generation_json(found, read_origin(folder, GENERATION)))
        _copy_tokenizer(folder, opened, part, found["max_position_embeddings"])
        if path.exists():
            path.rmdir()  # empty
        part.rename(path)
    world.barrier()
    lines = [f"{family.architecture} of step {opened.step} written to {path}: {numbers:,} numbers in {files} file(s), {usual}"]
    if min(widths) < hidden:
        lines.append(f"experts have {min(widths)} to {hidden} neurons, the architecture knows one width: the smaller ones are "
                     f"filled up with zeros to {hidden}, which computes the same")
    if config.router.capacity_factor:
        lines.append(f"router.capacity_factor={config.router.capacity_factor:g} drops rows in training; the exported model "
                     "drops none")
    return lines


def _dtypes(folder: RunFolder, wanted: str, own: torch.dtype) -> tuple[str, Callable[[str], torch.dtype]]:
    """(dtype of most tensors by name, name of a tensor of theirs -> dtype)."""
    kept = read_origin(folder, DTYPES)
    if wanted != "keep":
        kept = {"usual": wanted}
    usual = kept.get("usual", str(own).removeprefix("torch."))
    other: Mapping[str, str] = kept.get("other", {})
    return usual, lambda name: getattr(torch, other.get(name, usual))


def _dense_parts(opened: OpenedRun, family: Family, dtype_of: Callable[[str], torch.dtype]) -> Iterator[Part]:
    """Everything outside the experts."""
    state = opened.model.dense_state()
    for name, pieces in dense_pieces(opened.config, family, len(opened.model.head_weight)).items():
        yield Part({p.name: (p.shape, dtype_of(p.name)) for p in pieces},
                   lambda name=name, pieces=pieces: scatter(pieces, state[name]))


def _expert_parts(opened: OpenedRun, family: Family, hidden: int, dtype_of: Callable[[str], torch.dtype]) -> Iterator[Part]:
    """The experts of this rank, each filled up to `hidden` neurons."""
    for layer, bank in opened.model.banks.items():
        for expert in bank.expert_ids:
            table = expert_pieces(opened.config, family, layer, expert, hidden)
            pieces = [p for found in table.values() for p in found]

            def make(bank: Bank = bank, expert: int = expert, table: dict[str, Any] = table) -> dict[str, torch.Tensor]:
                dense = bank.stored(expert).dense()
                ours = {"w1": dense.gate, "w3": dense.up, "w2": dense.down}
                return {theirs: tensor for name, found in table.items()
                        for theirs, tensor in scatter(found, _filled(ours[name.rpartition(".")[2]], hidden)).items()}

            yield Part({p.name: (p.shape, dtype_of(p.name)) for p in pieces}, make)


def _filled(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, D]: zeros below."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - len(matrix)))


def _copy_tokenizer(folder: RunFolder, opened: OpenedRun, part: Path, longest: int) -> None:
    shutil.copyfile(folder.path / TOKENIZER, part / TOKENIZER)
    kept = [name for name in OF_TOKENIZER if (folder.path / FOLDER / name).is_file()]
    for name in kept:
        shutil.copyfile(folder.path / FOLDER / name, part / name)
    if OF_TOKENIZER[0] not in kept:
        _write(part / OF_TOKENIZER[0], tokenizer_json(opened.tokenizer, longest))


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
