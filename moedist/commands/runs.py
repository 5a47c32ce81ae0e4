"""Train, evaluate and generate."""

from __future__ import annotations

import argparse
import sys

from moedist.commands.parsing import add_command, not_negative, positive, say
from moedist.errors import ConfigError

EXAMPLES = {
    "train": """examples:
  torchrun --nproc-per-node 2 -m moedist train configs/quickstart.yaml
  moedist train configs/quickstart.yaml                       (one rank)
  moedist train --resume runs/quickstart-20260101-120000     (that run)
  moedist train configs/quickstart.yaml --resume             (the newest run of this name)
""",
    "evaluate": "example:\n  moedist evaluate runs/quickstart-20260101-120000 --split test\n",
    "generate": """examples:
  moedist generate runs/quickstart-20260101-120000 --prompt 'def read(' --max-tokens 60
  moedist generate runs/quickstart-20260101-120000 --prompts prompts.jsonl -n 4 --top-p 0.9 --json samples.json
""",
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
    generate.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    generate.add_argument("--prompts", metavar="FILE", help="more of them: one a line, or a .jsonl file of strings or objects "
                                                            "with a prompt")
    generate.add_argument("-n", "--samples", type=positive(int), default=1, help="continuations of each prompt (default 1)")
    generate.add_argument("--max-tokens", type=not_negative(int), default=100, help="new ones, at most (default 100)")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="end where this text would begin; may be given several times")
    generate.add_argument("--temperature", type=not_negative(float), default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=not_negative(int), default=50, help="draw among the k likeliest tokens (0: all)")
    generate.add_argument("--top-p", type=positive(float), default=1.0,
                          help="draw among the likeliest tokens that make up this probability (1: all)")
    generate.add_argument("--min-p", type=not_negative(float), default=0.0,
                          help="draw among tokens with at least so many times the probability of the likeliest (0: all)")
    generate.add_argument("--repetition-penalty", type=positive(float), default=1.0,
                          help="above 1: tokens that are there already are less likely (default 1)")
    generate.add_argument("--seed", type=int, default=0, help="another one gives other texts")
    generate.add_argument("--batch", type=positive(int), default=16, help="texts of a rank at a time (default 16)")
    generate.add_argument("--cache", action=argparse.BooleanOptionalAction, default=None,
                          help="keep keys and values of what was computed (default: where routers allow it)")
    generate.add_argument("--stream", action=argparse.BooleanOptionalAction, default=None,
                          help="write the text as it comes (default: of a single one, on a terminal)")
    generate.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    generate.add_argument("--json", metavar="FILE", help="write texts, token ids and timings to this file")


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
        from moedist.config import check_config, load_config
        from moedist.coordinator import written_plan
        config, ranks = load_config(args.config, args.overrides), args.ranks or _launched_ranks()
        check_config(config, ranks)
        from moedist.phases import check_methods
        check_methods(config)
        from moedist.routing import check_router
        check_router(config)
        from moedist.engine import check_deepspeed
        check_deepspeed(config)
        if config.data.source == "files":
            from moedist.data import source_splits
            source_splits(config.data)  # refuses a missing path and a folder without text
        plan, _ = written_plan(config, ranks, None)
        print(f"{args.config} is fine for {ranks} rank(s); "
              + ("experts are placed as it says" if plan else "they will be measured, then planned for"))
        return
    from moedist.trainer import train
    train(args.config, args.overrides, args.resume)


def _evaluate(args: argparse.Namespace) -> None:
    from moedist.evaluate import evaluate
    result, step = evaluate(args.run, args.split, args.overrides, args.step)
    say(f"{args.run} step {step}: {args.split} loss {result.loss:.4f}, perplexity {result.perplexity:.2f} per token "
         f"({result.tokens} tokens)")


def _generate(args: argparse.Namespace) -> None:
    if not args.prompt and not args.prompts:
        raise ConfigError("no prompt given; add --prompt TEXT or --prompts FILE")
    from moedist.decoding import Sampling
    from moedist.generate import generate, read_prompts
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    sampling = Sampling(args.max_tokens, args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
                        args.seed, args.samples)
    stream = args.stream if args.stream is not None else len(prompts) * args.samples == 1 and sys.stdout.isatty()
    texts = generate(args.run, prompts, sampling, args.overrides, step=args.step, stops=args.stop, batch=args.batch,
                     cache=args.cache, stream=stream, json_path=args.json)
    if not stream:
        say("\n---\n".join(prompt + sample.text for prompt, of_prompt in zip(prompts, texts) for sample in of_prompt))


def _launched_ranks() -> int:
    from moedist.world import find_launch  # imports torch
    return find_launch().size
