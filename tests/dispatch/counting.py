"""Count the collectives that a layer makes."""

from __future__ import annotations

from typing import Any

from moedist.dispatch import Transport


class Counting:
    """A transport that writes its calls down."""

    def __init__(self, inner: Transport, name: str, calls: list[str]):
        self.inner, self.name, self.calls = inner, name, calls
        self.rank, self.world_size = inner.rank, inner.world_size

    def all_gather_counts(self, counts: Any) -> Any:
        self.calls.append("counts")
        return self.inner.all_gather_counts(counts)

    def start(self, buffer: Any, send: Any, receive: Any, out: Any) -> "_Counted":
        assert send[self.rank] == receive[self.rank] == 0, "own rows stay out of the collective"
        self.calls.append(self.name)
        return _Counted(self.inner.start(buffer, send, receive, out), self)

    def exchange(self, buffer: Any, send: Any, receive: Any, out: Any) -> None:
        self.start(buffer, send, receive, out).wait()


class _Counted:
    def __init__(self, pending: Any, counting: Counting):
        self.pending, self.counting = pending, counting

    def wait(self) -> None:
        self.counting.calls.append(f"{self.counting.name} done")
        self.pending.wait()
