"""Lines on a disk that fills."""

import errno
import json
import os

import pytest

from moedist.monitor.lines import JsonLines


@pytest.fixture
def lines(tmp_path):
    said = []
    return JsonLines(tmp_path / "m.jsonl", said.append), tmp_path / "m.jsonl", said


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_wait_until_there_is_room(lines, monkeypatch):
    """A disk that takes 5 bytes more, then none, then all: every line is there once and whole."""
    file, path, said = lines
    file.write({"step": 1})
    assert steps(path) == [1]
    real, room = os.write, [5]

    def write(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(descriptor, data[:room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", write)
    file.write({"step": 2})
    file.write({"step": 3})
    assert len(said) == 1 and "No space left" in said[0] and str(path) in said[0]
    room[0] = 10**6
    file.write({"step": 4})
    assert steps(path) == [1, 2, 3, 4] and len(said) == 1
    room[0] = 5
    file.write({"step": 5})
    file.close()
    assert steps(path) == [1, 2, 3, 4], "nothing of a line that could not be written whole"
