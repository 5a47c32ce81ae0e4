"""A process that has imported moedist and forks ranks: most runs of the tests take less time than their imports.

The ranks are processes of their own with the variables that torchrun sets, and end as under torchrun: when one fails, the
others get SIGTERM. What is about torchrun itself, signals and kills starts it for real (`tests.launching.start`).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE_S = 30.0
# what ranks import only when they need it: a second or more of each of them
IMPORTED_LATER = ("torch.distributed.checkpoint", "torch._dynamo", "matplotlib.pyplot")


class WarmLauncher:
    """Client of a process in which moedist is imported. One command at a time."""

    def __init__(self, environment: dict[str, str]):
        self._server = subprocess.Popen([sys.executable, "-u", "-m", "tests.warm"], cwd=ROOT, env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        atexit.register(self.close)

    def run(self, ranks: int, arguments: list[str], environment: dict[str, str], port: int, timeout: float,
            script: str | None = None) -> subprocess.CompletedProcess:
        """As `subprocess.run`, of `moedist ARGUMENTS` on so many ranks, or of a script. Raises `subprocess.TimeoutExpired`."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            for path in (out, err):
                path.touch()
            order = {"ranks": ranks, "arguments": arguments, "environment": environment, "port": port, "timeout": timeout,
                     "script": script, "out": str(out), "err": str(err)}
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
            texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
        if not answer:
            raise RuntimeError("the process that starts ranks has ended:\n" + "\n".join(texts))
        code = json.loads(answer)
        if code is None:
            raise subprocess.TimeoutExpired(["moedist", *arguments], timeout, *texts)
        return subprocess.CompletedProcess(["moedist", *arguments], code, *texts)

    @property
    def ended(self) -> bool:
        return self._server.poll() is not None

    def close(self) -> None:
        if not self.ended:
            os.killpg(self._server.pid, signal.SIGKILL)


def serve() -> None:
    """Start what the lines of standard input ask for, and answer each by an exit code, null where it took too long."""
    import moedist.cli
    import moedist.compressing
    import moedist.evaluate
    import moedist.generate
    import moedist.inspect_routing
    import moedist.inspect_run
    import moedist.report
    import moedist.trainer  # noqa: F401
    for name in IMPORTED_LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        pids = {_fork(rank, order): rank for rank in range(order["ranks"])}
        print(json.dumps(_wait(pids, order["timeout"])), flush=True)


def _fork(rank: int, order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(order["environment"])
        if order["ranks"] > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["ranks"]), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(order["port"]))
        code = _main(order["arguments"], order["script"])
    finally:
        os._exit(code)


def _main(arguments: list[str], script: str | None) -> int:
    import runpy
    import traceback

    from moedist.cli import main
    sys.argv = [script or "moedist", *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__") if script else main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(pids: dict[int, int], timeout: float) -> int | None:
    """The first exit code that is not 0; None where some had to be ended since it took too long."""
    left, code, deadline, late = set(pids), 0, time.monotonic() + timeout, False
    while left:
        for pid in sorted(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            left.remove(pid)
            if status and not code:
                code, deadline = os.waitstatus_to_exitcode(status), min(deadline, time.monotonic() + GRACE_S)
                for other in left:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            late = late or not code
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            deadline += GRACE_S
        time.sleep(0.01)
    return None if late else code


if __name__ == "__main__":
    serve()
