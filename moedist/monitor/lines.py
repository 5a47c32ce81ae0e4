"""JSON lines on a disk that may be full for a while: lines wait in memory until there is room, none is written twice or half."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Mapping


class JsonLines:
    """A file that lines are added to; a line is on disk when it is written.

    Args:
        say: is told when lines begin to wait.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._waiting, self._told = b"", False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, values: Mapping[str, Any], **how: Any) -> None:
        """Add a line; `how` is for `json.dumps`. A full disk, or another failure to write, ends nothing."""
        self._waiting += (json.dumps(values, **how) + "\n").encode()
        self._flush()

    def close(self) -> None:
        """Write what waits, if it can be; of a line that was begun, else, nothing stays."""
        self._flush()
        if self._waiting and self._path.stat().st_size:
            whole = self._path.read_bytes().rpartition(b"\n")
            os.truncate(self._path, len(whole[0]) + len(whole[1]))
        os.close(self._descriptor)

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting):]
            self._told = False
        except OSError as error:
            if not self._told:
                self._told = True
                self._say(f"warning: could not write to {self._path} ({error.strerror}); lines wait in memory until they can "
                          "be written: free some space")
