"""`moedist import-hf`: a model of Hugging Face's format becomes a run, on any number of ranks."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Sequence

from moedist.checkpoint import RunFolder
from moedist.config import Config, check_config, config_from_dict, to_yaml
from moedist.coordinator import equal_plan, written_plan
from moedist.data import Tokenizer
from moedist.errors import ConfigError, DataError
from moedist.huggingface.families import DENSE, Family, family_of
from moedist.huggingface.fill import Table, fill
from moedist.huggingface.origin import TOKENIZER, keep_origin
from moedist.huggingface.read_config import read_config, refuse_window
from moedist.huggingface.source import Source, find_source
from moedist.huggingface.upcycle import Upcycle
from moedist.trainer import MODEL_MAY_CHANGE, build_run
from moedist.world import World, find_launch

# what routes as imported at step 0
ROUTER_MAY_CHANGE = ("balance_loss", "z_loss", "bias_rate", "bias_rule", "bias_in", "capacity_factor")


def import_run(path_or_name: str, name: str | None = None, folder: str = "runs", overrides: Sequence[str] = (),
               upcycle: str | None = None) -> RunFolder:
    """Write a new run folder that holds the model as the checkpoint of step 0; `train --resume` goes on from there.

    Args:
        path_or_name: a folder that save_pretrained wrote, or OWNER/NAME on the Hugging Face Hub.
        name: of the run (None: that of the model); folder: where run folders are made.
        overrides: dotted overrides of its configuration; `data.*` says what it will be trained on.
        upcycle: turn a dense model into a mixture of experts, see `moedist.huggingface.upcycle`.

    Raises:
        CheckpointError: no model there, or a damaged one. ConfigError: one that the model here cannot be.
    """
    size, source = find_launch().size, Source(find_source(path_or_name))
    config, family, recipe, notices = plan_import(source, name or default_name(path_or_name), folder, overrides, upcycle)
    check_config(config, size)
    table = Table(source, config, family, recipe)
    table.check()
    with World.start(config.world) as world:
        if world.is_main:
            for notice in notices:
                print(f"notice: {notice}", flush=True)
        return import_into(world, table, config)


def import_into(world: World, table: Table, config: Config) -> RunFolder:
    """`import_run` in a world that has started, from a source that has been checked."""
    plan = written_plan(config, world.size, None)[0] or equal_plan(config, world.size)
    # no logger: nothing is trained yet, and the run may never be
    quiet = dataclasses.replace(config, monitor=dataclasses.replace(config.monitor, wandb="disabled"))
    run = build_run(quiet, world, plan)
    try:
        _refuse_other_end(run.folder, config)
        fill(table, run.engine.named_tensors(), config.seed)
        run.engine.loaded(run.engine.counters())
        if world.is_main:
            own = keep_origin(table.source, run.folder, config, table.upcycle is None)
            run.folder.config_file.write_text(to_yaml(own), encoding="utf-8")
        run.save()
    finally:
        run.recorder.close()
        table.source.close()
    return run.folder


def plan_import(source: Source, name: str, folder: str, overrides: Sequence[str],
                upcycle: str | None) -> tuple[Config, Family, Upcycle | None, list[str]]:
    """(configuration of the run, family of the source, recipe of upcycling, notices for people). For errors see above."""
    where, family = source.config_file, family_of(source.config, source.config_file)
    recipe = None if upcycle is None else Upcycle.parse(upcycle)
    if (recipe is None) != family.sparse:
        raise ConfigError(f"{where}: {family.model_type} models have experts already; leave --upcycle out, or give a dense "
                          f"model ({', '.join(DENSE)})" if family.sparse else
                          f"{where}: {family.model_type} models are dense; give --upcycle experts=8,top_k=2 to make it a "
                          "mixture of experts")
    tree, notices = read_config(source.config, family, where)
    if recipe is not None:
        tree["model"] |= recipe.model_keys(tree["model"], where)
        if recipe.noise:
            notices.append(f"noise={recipe.noise:g}: the first logits are not exactly those of the dense model")
    tree |= {"name": name, "folder": folder}
    if not any(text.startswith("data.tokenizer=") for text in overrides):
        tree["data"]["tokenizer"] = str((source.path / TOKENIZER).absolute())
        if not (source.path / TOKENIZER).is_file():
            raise DataError(f"{source.path} has no {TOKENIZER}; write one with AutoTokenizer.from_pretrained(...)."
                            "save_pretrained(FOLDER) of transformers, or give another: data.tokenizer=PATH")
    config, as_read = config_from_dict(tree, overrides), config_from_dict(tree)
    _refuse_changes(as_read, config, where)
    refuse_window(source.config, config.data.sequence_length, where)
    notices += _tokenizer_notices(source.config, config, where)
    return config, family, recipe, notices


def default_name(path_or_name: str) -> str:
    """Of a run: the last part of the path, in characters that are safe in a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path_or_name).absolute().name)


def _refuse_changes(source: Config, config: Config, where: str) -> None:
    """Overrides may change how the model is trained, not what it is."""
    for section, free in (("model", MODEL_MAY_CHANGE), ("router", ROUTER_MAY_CHANGE)):
        old, new = getattr(source, section), getattr(config, section)
        for field in dataclasses.fields(old):
            values: list[Any] = [getattr(c, field.name) for c in (old, new)]
            if field.name not in free and values[0] != values[1]:
                raise ConfigError(f"{section}.{field.name}={values[1]} does not fit {where}, which makes it {values[0]}; "
                                  f"leave it out (free are {', '.join(free)}, and other sections)")


def _refuse_other_end(run: RunFolder, config: Config) -> None:
    """Text in the token cache is found by its tokenizer.json alone, which two models may share and end texts differently."""
    if Path(config.data.tokenizer).is_file():
        wanted, cached = Tokenizer.from_file(config.data.tokenizer).eos_id, Tokenizer.load(run.path).eos_id
        if wanted != cached:
            raise DataError(f"the token cache has this text with the same {TOKENIZER}, but ended by token {cached} instead of "
                            f"{wanted}; set data.cache to another folder")


def _tokenizer_notices(source: dict[str, Any], config: Config, where: str) -> list[str]:
    """What does not agree between a tokenizer.json and a config.json.

    Raises:
        ConfigError: more tokens than rows of the embedding.
    """
    if not Path(config.data.tokenizer).is_file():
        return []
    tokenizer, rows = Tokenizer.from_file(config.data.tokenizer), config.model.vocab_rows(0)
    if tokenizer.vocab_size > rows:
        raise ConfigError(f"{config.data.tokenizer} has {tokenizer.vocab_size} tokens, {where} has vocab_size {rows}; use the "
                          "tokenizer of this model")
    ends = source.get("eos_token_id")
    if ends is None or tokenizer.eos_id in (ends if isinstance(ends, list) else [ends]):
        return []
    return [f"texts end with token {tokenizer.eos_id} of {config.data.tokenizer}, {where} has eos_token_id {ends}"]
