"""The command line: parses, calls, and says what went wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from typing import NoReturn, Sequence

from moedist.commands import GROUPS
from moedist.errors import MoedistError, WorldError
from moedist.faults import current_watch, is_lost_rank
from moedist.mpi import end_process
from moedist.rendezvous.launch import Launch, find_launch

SPEAK_S = 2.0  # that a rank with nothing to say leaves the others to: launchers end all ranks when one has ended


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="moedist", description="Train Mixture-of-Experts language models over ranks "
                                     "that are not alike.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Errors that are the user's to mend are one line and exit code 1."""
    # Read when torch is first imported, below. GNU OpenMP's threads spin for milliseconds after each parallel region by
    # default, on the cores that the expert threads need (moedist.model.grouped_ffn); 1000 turns are some microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = parse(argv)
    try:
        args.handler(args)
        if (world := sys.modules.get("moedist.world")) and world.find_launch().size > 1:
            world.leave_process()
    except KeyboardInterrupt:
        _fail("interrupted")
    except Exception as error:
        _end_by(error, args.debug)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of a command; overrides may stand before, between and after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    stray = [a for a in rest if a.startswith("-") or "=" not in a]
    if stray or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)} (overrides are written section.key=value)")
    if hasattr(args, "overrides"):
        args.overrides += rest
        for name in ("config", "resume"):  # `train --resume RUN train.lr=1`, `train C --resume train.lr=1`
            value = getattr(args, name, None)
            if value and "=" in value and not os.path.exists(value):
                args.overrides.insert(0, value)
                setattr(args, name, "newest" if name == "resume" else None)
    return args


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
