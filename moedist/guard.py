"""How a process ends that is a rank, or alone: errors that are the user's to mend are one line and exit code 1."""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any, Callable, NoReturn

from moedist.errors import MoedistError, WorldError
from moedist.faults import current_watch, is_lost_rank
from moedist.mpi import end_process
from moedist.rendezvous.launch import Launch, find_launch

SPEAK_S = 2.0  # that a rank with nothing to say leaves the others to: launchers end all ranks when one has ended


def guarded(work: Callable[[], Any], debug: bool = False) -> Any:
    """What `work` returns; where it fails, one rank says why, and the process ends."""
    try:
        return work()
    except KeyboardInterrupt:
        _fail("interrupted")
    except Exception as error:
        _end_by(error, debug)


def _end_by(error: Exception, debug: bool) -> NoReturn:
    """End by an error: one line where it is the user's to mend, with the stack trace where it is not or `debug` is set.

    Of several ranks one speaks, and all end.
    """
    mendable = isinstance(error, (MoedistError, ImportError))
    text = str(error) if isinstance(error, MoedistError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        text = f"{error}; install what is missing, for example: pip install 'moedist[bench]'"
    watch = current_watch()
    if watch is None:  # one process, or ranks that have not met
        if debug or not mendable:
            raise error
        _fail(text, error.told_by if isinstance(error, WorldError) else "host")
    words = watch.last_words(error, " ".join(text.split()))
    if words is not None:
        if debug or not (mendable or is_lost_rank(error)):
            traceback.print_exception(error)
        print(f"moedist: error: {words}", file=sys.stderr, flush=True)
        watch.spoken()
    end_process()


def _fail(text: str, told_by: str = "rank") -> NoReturn:
    """Print an error on one line and end with exit code 1; `told_by` as in `WorldError`."""
    try:
        launch = find_launch()
    except WorldError:  # it is what is told here
        launch = Launch(0, 1, 0, "")
    if told_by == "rank" or (told_by == "host" and launch.local_rank in (0, None)):
        prefix = "" if launch.rank == 0 or text.startswith(f"rank {launch.rank} ") else f"rank {launch.rank}: "
        print(f"moedist: error: {prefix}{text}", file=sys.stderr, flush=True)
    elif launch.size > 1:
        time.sleep(SPEAK_S)
    sys.exit(1)
