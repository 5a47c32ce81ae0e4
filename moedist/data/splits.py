"""Which split a file or a published split belongs to, and how a validation part is held out where there is none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

SPLITS = ("train", "valid", "test")

# `trainset` and `validation` are what they seem; `testimony`, `developer` and `value` are not, hence the boundaries.
_SPLIT_WORDS = {
    "train": re.compile(r"(?<![a-z])train"),
    "valid": re.compile(r"(?<![a-z])(valid|(val|dev|eval)(?![a-z]))"),
    "test": re.compile(r"(?<![a-z])test(ing|set)?(?![a-z])"),
}


def split_of(name: str) -> str | None:
    """The split a file, folder or published split is named for, None where the name says nothing.

    >>> split_of("wiki.train.txt"), split_of("validation-00001"), split_of("dev"), split_of("testimony.txt")
    ('train', 'valid', 'valid', None)
    """
    matches = ((words.search(name.lower()), split) for split, words in _SPLIT_WORDS.items())
    starts = [(match.start(), split) for match, split in matches if match]
    return min(starts)[1] if starts else None  # the first word decides: `test-of-training` is a test


def group_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort names (paths with `/`, or published splits) into train, valid and test; absent splits have no entry.

    The outermost folder that names a split decides. Names that say nothing are training text only where no name says
    train: beside `train.txt`, a `vocab.txt` is not text to train on.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        split = next((found for part in name.split("/") if (found := split_of(part))), "unnamed")
        groups.setdefault(split, []).append(name)
    unnamed = groups.pop("unnamed", [])
    if unnamed and "train" not in groups:
        groups["train"] = unnamed
    return groups


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine and in every process."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def hold_out(documents: Iterable[str], split: str, fraction: float) -> Iterator[str]:
    """The `train` or `valid` part of documents that came without a validation split.

    A document is held out when the hash of its content is below `fraction`, so a repeated document never sits on both
    sides. A small corpus may have no such document; then the one with the smallest hash is held out (of two or more
    different documents), so that there is always something to validate on. One pass, one document in memory.
    """
    smallest, smallest_hash, copies = None, 2.0, 0  # best candidate while no document is below the fraction
    enough = fraction <= 0  # a fraction of 0 asks for no held-out part at all
    others = False
    for document in documents:
        number = unit_hash(document)
        if number < fraction:
            enough = True
            if split == "valid":
                yield document
        elif enough or number > smallest_hash:
            others = True
            if split == "train":
                yield document
        elif document == smallest:
            copies += 1
            continue
        else:  # a new candidate; the old one goes to train after all
            others = others or copies > 0
            if split == "train":
                yield from [smallest] * copies
            smallest, smallest_hash, copies = document, number, 1
            continue
        if enough and copies:
            if split == "train":
                yield from [smallest] * copies
            copies = 0
    if split == ("valid" if others else "train"):
        yield from [smallest] * copies
