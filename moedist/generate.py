"""`moedist generate`: continue prompts with a trained run, on any number of ranks."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any, Sequence

from moedist.checkpoint import RunFolder
from moedist.config import Config, check_config, for_ranks
from moedist.decoding import Sampling, Timings, cacheable, generate_batch
from moedist.decoding.text import Continuation, Streamer, StopStrings, continuation
from moedist.errors import ConfigError, DataError
from moedist.phases.restore import OpenedRun, open_run, take_outside
from moedist.phases.run import DTYPES
from moedist.world import World, find_launch


def generate(run_folder: str, prompts: Sequence[str], sampling: Sampling = Sampling(), overrides: Sequence[str] = (), *,
             step: int | None = None, stops: Sequence[str] = (), batch: int = 16, cache: bool | None = None,
             stream: bool = False, json_path: str | None = None) -> list[list[Continuation]]:
    """What comes after each prompt, `sampling.samples` times, on every rank.

    Samples are spread over the ranks, and each draws from a seed of its own, so the text does not depend on how many ranks
    there are. How fast it went is written to standard error.

    Args:
        stops: strings that end a text; they are not in it.
        batch: samples of a rank at a time.
        cache: False goes through the whole sequence for every token, as is done in any case where routers look across tokens.
        stream: rank 0 writes the text of the only sample to standard output as it comes, its prompt first.
        json_path: rank 0 writes everything to this file.

    Raises:
        CheckpointError: no run or checkpoint there. ConfigError: several samples to stream.
    """
    if stream and len(prompts) * sampling.samples != 1:
        raise ConfigError(f"--stream shows one text as it comes, but {len(prompts) * sampling.samples} are asked for; give "
                          "one prompt, and -n 1")
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), find_launch().size)
    check_config(config, find_launch().size)
    with World.start(config.world) as world:
        opened = open_run(folder, config, world, step)
        tokenizer, outside = opened.tokenizer, take_outside(opened)
        ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
        if world.is_main:
            for line in _remarks(opened, ids, sampling):
                print(line, file=sys.stderr, flush=True)
        ends, streamer = StopStrings(tokenizer, stops), None
        if stream and world.is_main:
            show = functools.partial(print, end="", flush=True)
            streamer = Streamer(tokenizer, ids[0], ends, show)
            show(prompts[0])
        found = generate_batch(opened.model, world, ids, sampling, context=config.data.sequence_length, eos=tokenizer.eos_id,
                               dtype=DTYPES[config.train.dtype], batch=batch, cache=cache, ended=ends, on_token=streamer)
        if streamer is not None:
            streamer.finish()
            print(flush=True)
        if outside is not None:
            outside.close()
        texts = [[continuation(tokenizer, ids[p], new, ends) for new in of_prompt] for p, of_prompt in enumerate(found.ids)]
        if world.is_main:
            print(found.timings.describe() + ("" if outside is None else f"\nrank 0: {outside.describe()}"), file=sys.stderr,
                  flush=True)
            if json_path:
                told = _facts(run_folder, opened, prompts, sampling, texts, found.timings, world)
                Path(json_path).write_text(json.dumps(told, indent=1), encoding="utf-8")
        return texts


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: JSON lines (`.jsonl`: strings, or objects with a `prompt`), else one a line; empty lines are
    left out.

    Raises:
        DataError: no such file, no prompts in it, or a line that is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts in {path} cannot be read ({error}); give a text file with one a line, or a .jsonl file"
                        ) from error
    prompts = [_prompt_of(line, f"{path}, line {number}") if path.endswith(".jsonl") else line
               for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no prompts; write one a line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}); write a string or an object with a \"prompt\" a line") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise DataError(f"{where}: no prompt; write a string, or an object such as {{\"prompt\": \"def \"}}")
    return prompt


def _remarks(opened: OpenedRun, ids: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
    """What a user should know of how these are continued."""
    config: Config = opened.config
    found, context = [], config.data.sequence_length
    if not cacheable(opened.model):
        why = "gives experts a capacity" if opened.model.causal else "looks across the tokens of a sequence"
        found.append(f"router {config.router.name} {why}: each token is computed from its whole sequence, without a cache")
    longest = max(map(len, ids), default=0) + sampling.max_tokens
    if longest - 1 > context:
        found.append(f"sequences of up to {longest} tokens outgrow data.sequence_length={context}: each then forgets all but "
                     f"its last {max(1, context // 2)} tokens, and goes on")
    return found


def _facts(run_folder: str, opened: OpenedRun, prompts: Sequence[str], sampling: Sampling,
           texts: Sequence[Sequence[Continuation]], timings: Timings, world: World) -> dict[str, Any]:
    told = dataclasses.asdict(timings) | {"prefill_tps": timings.prefill_tps, "decode_tps": timings.decode_tps}
    return {"run": run_folder, "step": opened.step, "ranks": world.size, "sampling": dataclasses.asdict(sampling),
            "samples": [{"prompt": prompts[p], "sample": n, **sample._asdict()}
                        for p, of_prompt in enumerate(texts) for n, sample in enumerate(of_prompt)], "timings": told}
