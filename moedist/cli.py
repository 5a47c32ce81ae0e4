"""The command line: parses and calls."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Sequence

from moedist.commands import GROUPS
from moedist.guard import guarded


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
        guarded(lambda: args.handler(args), args.debug)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is there anything to flush at the end
        sys.exit(1)
    if (world := sys.modules.get("moedist.world")) and world.find_launch().size > 1:
        world.leave_process()


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
