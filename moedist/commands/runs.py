"""Train, evaluate and generate."""

from __future__ import annotations

import argparse

from moedist.commands.parsing import add_command, not_negative, say
from moedist.errors import ConfigError

EXAMPLES = {
    "train": """examples:
  torchrun --nproc-per-node 2 -m moedist train configs/quickstart.yaml
  moedist train configs/quickstart.yaml                       (one rank)
  moedist train --resume runs/quickstart-20260101-120000     (that run)
  moedist train configs/quickstart.yaml --resume             (the newest run of this name)
""",
    "evaluate": "example:\n  moedist evaluate runs/quickstart-20260101-120000 --split test\n",
    "generate": "example:\n  moedist generate runs/quickstart-20260101-120000 --prompt 'def read(' --max-tokens 60\n",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    train = add_command(commands, "train", "train a configuration, or go on with a run", _train, EXAMPLES["train"], _keys_help)
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("overrides", nargs="*", help="section.key=value")
    train.add_argument("--resume", nargs="?", const="newest", metavar="RUN",
                       help="go on with this run folder; without RUN, with the newest run of the configuration's name; "
                            "auto: with that where there is one, else start afresh (for jobs that are requeued)")
    train.add_argument("--profile", metavar="steps=FIRST-LAST",
                       help="trace these steps on every rank, such as steps=10-15 (the same as monitor.profile=10-15)")
    train.add_argument("--check", action="store_true", help="check the configuration for this number of ranks and stop")
    train.add_argument("--ranks", type=int, help="with --check: number of ranks (default: as launched)")

    evaluate = add_command(commands, "evaluate", "perplexity of a run on a held-out split", _evaluate, EXAMPLES["evaluate"])
    evaluate.add_argument("run", help="run folder")
    evaluate.add_argument("overrides", nargs="*", help="section.key=value")
    evaluate.add_argument("--split", default="valid", choices=["train", "valid", "test"])
    evaluate.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")

    generate = add_command(commands, "generate", "continue prompts with a trained run", _generate, EXAMPLES["generate"])
    generate.add_argument("run", help="run folder")
    generate.add_argument("overrides", nargs="*", help="section.key=value")
    generate.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    generate.add_argument("--max-tokens", type=not_negative(int), default=100)
    generate.add_argument("--temperature", type=not_negative(float), default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=not_negative(int), default=50, help="draw among the k likeliest tokens (0: all)")
    generate.add_argument("--seed", type=int, default=0)


def _keys_help() -> str:
    from moedist.config import describe_keys
    from moedist.routing import describe_options
    return (f"\nconfiguration keys (section.key=default):\n{describe_keys()}\n\n"
            f"router.options, such as 'router.options={{threshold: 0.4}}':\n{describe_options()}\n")


def _train(args: argparse.Namespace) -> None:
    if args.profile is not None:
        args.overrides.append(f"monitor.profile={args.profile.removeprefix('steps=')}")
    if args.config is None and args.resume in (None, "newest", "auto"):
        raise ConfigError("no configuration given; try: moedist train configs/quickstart.yaml, or --resume RUN_FOLDER")
    if args.check and args.config is None:
        raise ConfigError("--check needs a configuration file")
    if args.check:
        from moedist.config import load_config
        from moedist.coordinator import written_plan
        config, ranks = load_config(args.config, args.overrides), args.ranks or _launched_ranks()
        from moedist.phases import check_training
        notices = check_training(config, ranks)
        if config.data.source == "files":
            from moedist.data import source_splits
            source_splits(config.data)  # refuses a missing path and a folder without text
        plan, _ = written_plan(config, ranks, None)
        print(f"{args.config} is fine for {ranks} rank(s); "
              + ("experts are placed as it says" if plan else "they will be measured, then planned for"))
        for notice in notices:
            print(f"warning: {notice}")
        return
    from moedist.trainer import train
    train(args.config, args.overrides, args.resume)


def _evaluate(args: argparse.Namespace) -> None:
    from moedist.evaluate import evaluate
    result, step = evaluate(args.run, args.split, args.overrides, args.step)
    say(f"{args.run} step {step}: {args.split} loss {result.loss:.4f}, perplexity {result.perplexity:.2f} per token "
         f"({result.tokens} tokens)")


def _generate(args: argparse.Namespace) -> None:
    from moedist.generate import generate
    texts = generate(args.run, args.prompt, args.max_tokens, args.temperature, args.top_k, args.seed, args.overrides)
    say("\n---\n".join(texts))


def _launched_ranks() -> int:
    from moedist.world import find_launch  # imports torch
    return find_launch().size
