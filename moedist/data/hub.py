"""Documents from a dataset of the Hugging Face Hub, with an error within seconds where the Hub is out of reach."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from moedist.config.schema import DataConfig
from moedist.data.files import missing_column, text_of
from moedist.data.splits import group_by_split
from moedist.errors import DataError

PROBE_SECONDS = 5
OFFLINE_WAYS = "use data.source=embedded, or data.source=files data.path=FOLDER"


def hub_splits(config: DataConfig) -> dict[str, list[str]]:
    """train, valid, test -> the names of the dataset's published splits.

    Raises:
        DataError: the dataset cannot be loaded, or has no training split.
    """
    published = _load(config.path, config.name, config.streaming)
    groups = group_by_split(published)
    if "train" not in groups:
        raise DataError(f"{config.path} has only the splits {', '.join(published)}, none to train on; "
                        "choose another data.path or data.name")
    return groups


def read_hub(config: DataConfig, names: list[str]) -> Iterator[str]:
    """The documents of some published splits, in order; empty rows are left out by the caller.

    Raises:
        DataError: no column `data.text_field`, or the connection broke while streaming.
    """
    published = _load(config.path, config.name, config.streaming)
    for name in names:
        rows = published[name]
        if rows.column_names is not None:  # a streamed dataset may know its columns from its first row only
            if config.text_field not in rows.column_names:
                raise DataError(missing_column(config.text_field, rows.column_names, config.path))
            rows = rows.select_columns([config.text_field])
        try:
            for row in rows:
                yield text_of(row, config.text_field, config.path)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"reading {config.path} ({name}) broke off: {_one_line(error)}; start again, "
                            f"or {OFFLINE_WAYS}") from error


@lru_cache(maxsize=2)  # every split is read from the same loaded dataset
def _load(path: str, name: str | None, streaming: bool) -> Any:
    """`datasets.load_dataset` with all splits: a dictionary of split name -> rows."""
    try:
        import datasets  # lazily: the import takes seconds, and only this source needs it
    except ImportError as error:
        raise DataError("data.source=hub needs the datasets library: pip install datasets, "
                        f"or {OFFLINE_WAYS}") from error
    unreachable = None if os.path.isdir(path) else _probe(path)
    try:
        if unreachable is None:
            return datasets.load_dataset(path, name, streaming=streaming)
        with _offline(datasets):  # it may have been downloaded before
            return datasets.load_dataset(path, name, streaming=streaming)
    except Exception as error:  # datasets raises almost any type, none of them this program's fault
        if unreachable is not None:
            raise DataError(f"the Hugging Face Hub cannot be reached ({unreachable}) and {path} was not downloaded "
                            f"before; {OFFLINE_WAYS}") from error
        raise DataError(f"cannot load {path} (data.name={name}): {_one_line(error)}; check data.path and data.name, "
                        f"or {OFFLINE_WAYS}") from error


def _probe(path: str) -> str | None:
    """None when the Hub answers for this dataset, else why it does not.

    One request without retries: `load_dataset` itself would try six times over 23 seconds before it gives up.

    Raises:
        DataError: the Hub answers that there is no such dataset, or that it needs a login.
    """
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=PROBE_SECONDS)
    except RepositoryNotFoundError as error:
        raise DataError(f"the Hugging Face Hub has no dataset {path} for this user; check data.path, run "
                        f"`hf auth login` if it is private or gated, or {OFFLINE_WAYS}") from error
    except HFValidationError as error:
        raise DataError(f"data.path={path} is no dataset name: {_one_line(error)}; give OWNER/NAME, "
                        f"or {OFFLINE_WAYS}") from error
    except Exception as error:  # noqa: BLE001  the HTTP library, and so the error type, differs between versions
        return _one_line(error)
    return None


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Let `datasets` look in its cache only. The environment variables are read at import, hence the attributes."""
    from huggingface_hub import constants

    places = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
