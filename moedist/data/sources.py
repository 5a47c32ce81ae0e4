"""Where training text comes from: one way to read the documents of a split, whatever the source."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from moedist.config.schema import DataConfig
from moedist.data.embedded import embedded_documents
from moedist.data.files import files_by_split, read_files
from moedist.data.hub import hub_splits, read_hub
from moedist.data.splits import SPLITS, hold_out, unit_hash
from moedist.errors import DataError


def source_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that `read_documents` has for this source, out of train, valid and test.

    `train` is always among them. `valid` is missing only where the source has none and `data.valid_fraction` is 0.

    Raises:
        DataError: missing path, no readable file, unreachable Hub.
    """
    if config.source == "embedded":
        return SPLITS if config.valid_fraction > 0 else ("train",)
    own = _own_splits(config)
    return tuple(split for split in SPLITS if split in own or (split == "valid" and config.valid_fraction > 0))


def read_documents(config: DataConfig, split: str) -> Iterator[str]:
    """The documents of one split, in a fixed order, without blank ones.

    A split that the source has is read as it is. Held out otherwise: from `embedded`, `data.valid_fraction` of the
    modules for `valid` and again for `test`; from a source without a validation split, that fraction of the training
    documents. `data.max_documents` stops the reading of a split; where `valid` is held out of `train`, it stops the
    reading of what both are taken from, so that validating on a stream does not read far beyond the training part.

    Args:
        split: train, valid or test.

    Raises:
        DataError: as `source_splits`, or the source has no such split, or a document cannot be read.
    """
    if split not in source_splits(config):
        raise DataError(f"data.source={config.source} has no {split} split; it has {', '.join(source_splits(config))}")
    if config.source == "embedded":
        chosen = (document.read() for document in embedded_documents()
                  if embedded_split(document.module, config.valid_fraction) == split)
        return islice((text for text in chosen if text.strip()), config.max_documents)
    own = _own_splits(config)
    if split in own and (split == "test" or "valid" in own):
        return _read(config, split, finer=False)
    return hold_out(_read(config, "train", finer=True), split, config.valid_fraction)


def embedded_split(module: str, valid_fraction: float) -> str:
    """The split of a module of the standard library: its code and its documentation go to the same one.

    Raises:
        DataError: a fraction that leaves nothing to train on.
    """
    if valid_fraction >= 0.5:
        raise DataError(f"data.valid_fraction={valid_fraction} is held out of data.source=embedded twice, for "
                        "valid and test, and leaves nothing to train on; set data.valid_fraction=0.05")
    number = unit_hash(module)
    if number < valid_fraction:
        return "valid"
    return "test" if number < 2 * valid_fraction else "train"


def _own_splits(config: DataConfig) -> dict[str, list]:
    """The splits that a source has itself: files by split, or names of published splits."""
    if not config.path:
        raise DataError(f"data.source={config.source} needs data.path; or use data.source=embedded")
    if config.source == "files":
        return files_by_split(config.path)
    if config.source == "hub":
        return hub_splits(config)
    raise DataError(f"data.source is {config.source!r}; choose one of embedded, files, hub")


def _read(config: DataConfig, split: str, finer: bool) -> Iterator[str]:
    own = _own_splits(config)[split]
    rows = read_files(own, config.text_field, finer) if config.source == "files" else read_hub(config, own)
    return islice((text for text in rows if text.strip()), config.max_documents)
