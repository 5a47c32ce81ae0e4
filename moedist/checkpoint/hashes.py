"""Content hashes: what each tensor, and each expert as a whole, must hold when a checkpoint is read again.

    {"files": {"meta.json": sha256, ".metadata": sha256},
     "tensors": {"layers.3.experts.17.w1": [sha256 of dtype, shape and numbers, crc32 of its bytes in the file]},
     "experts": {"layers.3.experts.17": sha256 over its tensors and their moments}}

The sha256 is that of the contents, whichever rank, placement or file they are in: two checkpoints hold the same expert where
it is equal. The crc32 covers what a file has around them (each tensor is a small archive of its own), so that no byte that is
read goes unchecked. Both are made by the rank that writes, from its memory and from its file read back.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple

import torch

HASHES = "hashes.json"
EXPERT = re.compile(r"layers\.(\d+)\.experts\.(\d+)(?=\.)")
CHUNK = 2**24  # bytes of a file read at once


class TensorHash(NamedTuple):
    """Of the contents, and of the bytes they are stored as."""

    sha256: str
    crc32: int


def content_hash(tensor: torch.Tensor) -> str:
    """sha256 of dtype, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    host = tensor.detach().cpu().contiguous()
    if host.numel():
        digest.update(memoryview(host.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def stored_hash(path: Path, offset: int, length: int) -> int:
    """crc32 of a stretch of a file; of less where the file ends before."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while length and (piece := file.read(min(length, CHUNK))):
            value, length = zlib.crc32(piece, value), length - len(piece)
    return value


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expert_of(name: str) -> str | None:
    """`layers.3.experts.17` of any of its tensors and their moments; None for a dense tensor.

    >>> expert_of("optimizer.exp_avg.layers.3.experts.17.w1"), expert_of("embedding.weight")
    ('layers.3.experts.17', None)
    """
    found = EXPERT.search(name)
    return found and found[0]


def expert_hashes(contents: Mapping[str, str]) -> dict[str, str]:
    """Expert -> sha256 over the names and hashes of all its tensors.

    Args:
        contents: tensor -> sha256.
    """
    digests: dict[str, Any] = {}
    for name in sorted(contents):
        if expert := expert_of(name):
            digests.setdefault(expert, hashlib.sha256()).update(f"{name} {contents[name]}\n".encode())
    return {expert: digest.hexdigest() for expert, digest in digests.items()}


def hashes_json(folder: Path, files: Iterable[str], tensors: Mapping[str, TensorHash]) -> str:
    """What goes into hashes.json; without white space, so that no byte of it is without meaning."""
    return json.dumps({"files": {name: file_hash(folder / name) for name in files}, "tensors": tensors,
                       "experts": expert_hashes({name: h.sha256 for name, h in tensors.items()})}, separators=(",", ":"))


class Hashes:
    """The hashes of a checkpoint. Methods return what is wrong, in words, or None.

    Raises:
        OSError, ValueError: they are missing or damaged themselves.
    """

    def __init__(self, checkpoint: Path):
        self.folder, found = checkpoint, json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        try:
            self.files: dict[str, str] = dict(found["files"])
            self.tensors = {name: TensorHash(*h) for name, h in found["tensors"].items()}
            self.experts: dict[str, str] = dict(found["experts"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{HASHES} is damaged ({error})") from error

    def of_file(self, name: str) -> str | None:
        if not (self.folder / name).is_file():
            return f"{name} is missing"
        return None if file_hash(self.folder / name) == self.files.get(name) else f"{name} is not what was written"

    def of_stored(self, name: str, file: str, offset: int, length: int) -> str | None:
        """Of a tensor's bytes in its file."""
        if name not in self.tensors:
            return f"{HASHES} does not know {described(name)}"
        if not (self.folder / file).is_file():
            return f"{file} is missing, with {described(name)}"
        same = stored_hash(self.folder / file, offset, length) == self.tensors[name].crc32
        return None if same else f"{file} is not what was written, at {described(name)}"

    def of_contents(self, contents: Mapping[str, str]) -> str | None:
        """Of tensors that were read, and of the experts that were read as a whole.

        Args:
            contents: tensor -> sha256 of what was read.
        """
        for name, sha256 in contents.items():
            if sha256 != self.tensors[name].sha256:
                return f"{described(name)} is not what was written"
        whole = expert_hashes({name: contents.get(name, "") for name in self.tensors})
        missing = {expert_of(name) for name in self.tensors.keys() - contents.keys()}
        for expert, sha256 in whole.items():
            if expert not in missing and sha256 != self.experts.get(expert):
                return f"{HASHES} is damaged at {expert}"
        return None


def described(name: str) -> str:
    """
    >>> described("layers.3.experts.17.w1")
    'layers.3.experts.17.w1 (expert 17 of layer 3)'
    """
    found = EXPERT.search(name)
    return f"{name} (expert {found[2]} of layer {found[1]})" if found else name
