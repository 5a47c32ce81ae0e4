"""What all commands have in common: a parser with an example, numbers within bounds, one voice of many ranks."""

from __future__ import annotations

import argparse
from typing import Callable


def add_command(commands: argparse._SubParsersAction, name: str, text: str, run: Callable, example: str,
                more_help: Callable[[], str] | None = None) -> argparse.ArgumentParser:
    """A command `name` that calls `run` with its arguments; `more_help` is appended to its help."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                 formatter_class=argparse.RawDescriptionHelpFormatter, epilog=example)
    if more_help is not None:
        plain_help = parser.format_help
        parser.format_help = lambda: plain_help() + more_help()
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    parser.set_defaults(handler=run)
    return parser


def not_negative(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (value := kind(text)) < 0:
            raise argparse.ArgumentTypeError(f"{text} is below 0")
        return value

    return parse


def positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def say(text: str) -> None:
    """Print once, whatever the number of ranks."""
    from moedist.world import find_launch
    if find_launch().rank == 0:
        print(text)
