"""What an imported run keeps of its source, so that an export is as the source was: `huggingface/` in the run folder.

config.json, generation_config.json and what belongs to the tokenizer are copies; `dtypes.json` says in what each tensor was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from moedist.checkpoint import RunFolder
from moedist.config import Config
from moedist.huggingface.source import CONFIG, Source

FOLDER, DTYPES = "huggingface", "dtypes.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
OF_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                "tokenizer.model", "chat_template.jinja", "chat_template.json")


def keep_origin(source: Source, run: RunFolder, config: Config, same_model: bool) -> Config:
    """Copy what belongs to a source into a run's folder; the configuration, with the run's own copy of the tokenizer.

    Args:
        same_model: False where the run's tensors are not those of the source, so that their dtypes mean nothing.
    """
    kept = run.path / FOLDER
    kept.mkdir()
    own_tokenizer = Path(config.data.tokenizer) == (source.path / TOKENIZER).absolute()
    for name in (CONFIG, GENERATION, *(OF_TOKENIZER if own_tokenizer else ())):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, kept / name)
    found = {name: source.dtype(name) for name in source.files}
    usual = Counter(found.values()).most_common(1)[0][0]
    other = {name: _text(dtype) for name, dtype in found.items() if dtype != usual} if same_model else {}
    (kept / DTYPES).write_text(json.dumps({"usual": _text(usual), "other": other}, indent=1), encoding="utf-8")
    if not own_tokenizer:
        return config
    # byte for byte: what the library writes means the same but is laid out differently
    shutil.copyfile(source.path / TOKENIZER, run.path / TOKENIZER)
    data = dataclasses.replace(config.data, tokenizer=str((run.path / TOKENIZER).absolute()))
    return dataclasses.replace(config, data=data)


def read_origin(run: RunFolder, name: str) -> dict[str, Any]:
    """A JSON file of what is kept; empty where the run was not imported, or its source had none."""
    path = run.path / FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
