"""`moedist evaluate`: perplexity of a run on a held-out split, on any number of ranks."""

from __future__ import annotations

import functools
import json
from typing import Sequence

from tqdm import tqdm

from moedist.checkpoint import RunFolder
from moedist.config import check_config, for_ranks
from moedist.data import EvalStream, prepare_corpus
from moedist.errors import DataError
from moedist.monitor.recorder import finite
from moedist.phases.evaluation import HeldOut, held_out_loss
from moedist.phases.restore import offload_metrics, open_run, take_outside
from moedist.phases.run import DTYPES
from moedist.world import World, find_launch


def evaluate(run_folder: str, split: str = "valid", overrides: Sequence[str] = (),
             step: int | None = None) -> tuple[HeldOut, int]:
    """(loss on a split, step of the checkpoint).

    Raises:
        CheckpointError: no run or checkpoint there. DataError: the text has no such split.
    """
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), find_launch().size)
    check_config(config, find_launch().size)
    with World.start(config.world) as world:
        opened = open_run(folder, config, world, step)
        corpus = prepare_corpus(config.data)
        tokens = getattr(corpus, split)
        if tokens is None:
            raise DataError(f"the text of {folder} has no {split} split; use --split valid or train")
        stream = EvalStream(tokens, config.data.sequence_length)
        sequences = max(config.train.batch, world.size)
        bar = functools.partial(tqdm, desc=split, unit="batch", leave=False, disable=not world.is_main or None)
        outside = take_outside(opened)
        found = held_out_loss(opened.model, stream, world, DTYPES[config.train.dtype], sequences, bar)
        if outside is not None:
            outside.close()
            values = offload_metrics(outside, world)
            if world.is_main:
                with open(folder.metrics_file, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": opened.step, **finite(values)}) + "\n")
                print(f"rank 0: {outside.describe()}", flush=True)
        return found, opened.step
