"""A folder of Hugging Face's format: its config.json, and tensors read one by one, or a part of one, from safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import SafetensorError, safe_open

from moedist.errors import CheckpointError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NEEDED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]  # of a repository on the Hub
LEFT_OUT = ("rotary_emb.inv_freq",)  # buffers that old versions stored


class Source:
    """The tensors of a folder by name. Nothing is read before it is asked for; close it when done.

    Attributes:
        path: the folder.
        config: its config.json.
        files: name of every tensor -> its file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
        self.config: dict[str, Any] = self._json(CONFIG)
        self.files = {name: file for name, file in self._places() if not name.endswith(LEFT_OUT)}

    @property
    def config_file(self) -> str:
        """For messages."""
        return str(self.path / CONFIG)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from its file's header.

        Raises:
            CheckpointError: there is no such tensor, or its file is missing or damaged.
        """
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, from its file's header; for errors see `shape`, and a dtype that weights do not have."""
        found = self._slice(name).get_dtype()
        if found not in DTYPES:
            raise CheckpointError(f"{self.files[name]} has {name} in {found}; weights must be in one of {', '.join(DTYPES)}: "
                                  "dequantise them first")
        return DTYPES[found]

    def read(self, name: str, *where: slice) -> torch.Tensor:
        """A tensor, or the part of it that the slices say; for errors see `shape`."""
        part = self._slice(name)
        try:
            return part[where or (slice(None),)]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{self.files[name]} is damaged: {name} cannot be read ({error}); fetch it again") from error

    def close(self) -> None:
        """Let go of all files."""
        self._open.clear()

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name!r}, which its {CONFIG} asks for; is the folder whole?")
        return self._file(self.files[name]).get_slice(name)

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise CheckpointError(f"{self.path / INDEX} names {file.name}, which is not there; fetch it too")
            try:
                self._open[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is damaged ({error}); fetch it again") from error
        return self._open[file]

    def _places(self) -> Iterator[tuple[str, Path]]:
        if (self.path / INDEX).is_file():
            yield from ((name, self.path / file) for name, file in self._json(INDEX).get("weight_map", {}).items())
            return
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} holds no *.safetensors; write it again with save_pretrained of transformers")
        for file in files:
            yield from ((name, file) for name in self._file(file).keys())

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} holds no {name} that can be read ({error}); give a folder that "
                                  "save_pretrained of transformers wrote") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / name} holds no JSON object; fetch it again")
        return found


def find_source(text: str) -> Path:
    """The folder of a path, or of a name on the Hugging Face Hub, which is downloaded unless it has been.

    Raises:
        CheckpointError: neither.
    """
    if Path(text).is_dir():
        return Path(text)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"no folder {text}; give a folder that save_pretrained of transformers wrote, or OWNER/NAME of "
                              "a model on the Hugging Face Hub")
    import huggingface_hub  # here: it takes a second, and a folder does not need it
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=NEEDED))
    except Exception as error:  # noqa: BLE001  the HTTP library, and so the error type, differs between versions
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(f"no folder {text}, and the Hugging Face Hub does not give it ({cause}); check the name, log in "
                              "with `hf auth login` if it is gated, or give a folder") from error
