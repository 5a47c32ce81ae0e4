"""Compress the experts of a run, and look at them."""

from __future__ import annotations

import argparse

from moedist.commands.parsing import add_command, positive, say
from moedist.errors import ConfigError

EXAMPLES = {
    "compress": """examples:
  moedist compress runs/quickstart-20260101-120000 --ratio 0.7
  moedist compress runs/quickstart-20260101-120000 --sweep 0.5,0.7 --methods cur,svd-whitened --out sweep
  moedist compress runs/quickstart-20260101-120000 --heal 30 --methods cur,cur-hybrid --ratio 0.7
  moedist compress runs/quickstart-20260101-120000 --method beam --bits 3 --budget 3.75 --top-n 1
  moedist compress runs/quickstart-20260101-120000 --method beam --sweep --methods bits=3,bits=2+budget=2.75+top_n=1
""",
    "inspect": """examples:
  moedist inspect runs/quickstart-20260101-120000 --pictures pictures
  moedist inspect runs/quickstart-20260101-120000 --layer 0 --expert 3 --top 10 --json inspect.json
  moedist inspect runs/quickstart-20260101-120000 --routing --segments 8 32 --caches 4 8 --json routing.json
""",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    compress = add_command(commands, "compress", "make the experts of a run's checkpoint smaller, or compare methods", _compress,
                           EXAMPLES["compress"])
    compress.add_argument("run", help="run folder")
    compress.add_argument("overrides", nargs="*", help="section.key=value")
    compress.add_argument("--method", default="cur", help="how (default cur; moedist.compress lists all)")
    compress.add_argument("--bits", type=int, default=3, help="with --method beam: 2, 3, 4 or 8 a weight (default 3)")
    compress.add_argument("--budget", metavar="BITS",
                          help="with --method beam: bits a weight, scales and compensators included (or bytes of all experts); "
                               "default: no compensators")
    compress.add_argument("--top-n", metavar="N",
                          help="with --method beam: compensators are used at so many of a token's experts, those its router "
                               "trusts most; one for all layers, or a list (default: all)")
    compress.add_argument("--ratio", type=float, default=0.5, help="share of the experts' bytes to remove (default 0.5)")
    compress.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                          help="another key of a compress phase, such as budget=uniform, or options.least_squares=false; with "
                               "--method beam a field of moedist.compress.Beam, such as ranks=kurtosis")
    compress.add_argument("--name", help="of the new run (default: that of the old and the method)")
    compress.add_argument("--sweep", nargs="?", const="", metavar="RATIOS",
                          help="write no run; show perplexity after each method at these ratios (0.2,0.4,...)")
    compress.add_argument("--heal", type=int, metavar="STEPS",
                          help="write no run; train on for so many steps after each of --methods at --ratio, and without")
    compress.add_argument("--dense", action="store_true",
                          help="write a run whose compressed experts are dense again, in their old shape, what was dropped zero")
    compress.add_argument("--methods", metavar="NAMES",
                          help="with --sweep (default: all) and --heal (default: --method): separated by commas; with --method "
                               "beam ways such as bits=2+budget=2.75+top_n=1")
    compress.add_argument("--tokens", type=int, default=65536, help="training tokens that the experts are watched on")
    compress.add_argument("--split", default="valid", choices=["train", "valid", "test"], help="with --sweep: evaluated on it")
    compress.add_argument("--eval-tokens", type=int, help="with --sweep: of the split (default: as in training)")
    compress.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    compress.add_argument("--out", metavar="FOLDER", help="with --sweep: write sweep.csv and sweep.png there")
    compress.add_argument("--json", help="with --sweep and --heal: write the figures to this file")

    inspect = add_command(commands, "inspect", "what a run's experts do, neuron by neuron, and what compression kept of them",
                       _inspect, EXAMPLES["inspect"])
    inspect.add_argument("run", help="run folder")
    inspect.add_argument("overrides", nargs="*", help="section.key=value")
    inspect.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    inspect.add_argument("--layer", type=int, nargs="+", metavar="I", help="only these layers (default: all with experts)")
    inspect.add_argument("--expert", type=int, nargs="+", metavar="E",
                         help="neurons of these experts (default: all in the JSON, the foremost of each layer in the tables)")
    inspect.add_argument("--tokens", type=positive(int), default=16384, metavar="N",
                         help="validation tokens to watch the experts on (default 16384)")
    inspect.add_argument("--top", type=positive(int), default=5, metavar="K",
                         help="neurons told in full, of each expert, by Fisher score (default 5)")
    inspect.add_argument("--routing", action="store_true",
                         help="instead: how even routing is, how long a token's experts stay those of the next tokens (SRP, "
                              "SCH), and how experts follow from those of the layer before; with --json a picture beside it")
    inspect.add_argument("--segments", type=positive(int), nargs="+", metavar="M",
                         help="with --routing: tokens that are looked at together (default 4 16 64)")
    inspect.add_argument("--caches", type=positive(int), nargs="+", metavar="C",
                         help="with --routing: experts that a cache holds (default: 1, 2 and 4 times those of a token)")
    inspect.add_argument("--json", help="write everything to this file")
    inspect.add_argument("--pictures", metavar="FOLDER", help="draw PNG pictures into this folder")


def _compress(args: argparse.Namespace) -> None:
    from moedist.compress import BEAM
    if args.method == BEAM:
        _beam(args)
        return
    if args.sweep is not None:
        from moedist.compressing.sweep import METHODS, RATIOS, sweep_run
        try:
            ratios = [float(text) for text in args.sweep.split(",")] if args.sweep else RATIOS
        except ValueError as error:
            raise ConfigError(f"--sweep takes ratios such as 0.5,0.7, not {args.sweep!r}") from error
        sweep_run(args.run, args.methods.split(",") if args.methods else tuple(METHODS), ratios, args.tokens, args.split,
                  args.eval_tokens, args.overrides, args.step, args.out, args.json)
        return
    from moedist.compressing import compress_run, dense_run, heal_run
    from moedist.config import compress_options
    if args.heal is not None:
        methods = args.methods.split(",") if args.methods else [args.method]
        heal_run(args.run, methods, args.ratio, args.heal, args.tokens, args.overrides, args.step, args.json, args.option)
        return
    if args.dense:
        from moedist.trainer import train_on
        folder = dense_run(args.run, args.overrides, args.step, args.name)
        say(f"written: {folder}\nnext, to train on: {train_on(folder)}")
        return
    c = compress_options(args.method, args.ratio, args.tokens, args.option)
    folder = compress_run(args.run, c, args.overrides, args.step, args.name)
    from moedist.trainer import program, train_on
    say(f"next: {program()} evaluate {folder}   or, to train on: {train_on(folder)}")


def _beam(args: argparse.Namespace) -> None:
    from moedist.compressing.low_bits import beam_options, beam_run, parse_top_n
    from moedist.compressing.low_bits_sweep import VARIANTS, low_bits_sweep
    if args.heal is not None or args.dense:
        raise ConfigError("--method beam is for experts that are not trained any more; --heal and --dense are for the others")
    if args.sweep is not None:
        low_bits_sweep(args.run, args.methods.split(",") if args.methods else VARIANTS, args.tokens, args.split,
                       args.eval_tokens, args.overrides, args.step, args.json)
        return
    folder = beam_run(args.run, beam_options(args.bits, args.budget, args.option), parse_top_n(args.top_n), args.tokens,
                      args.overrides, args.step, args.name)
    from moedist.trainer import program
    say(f"next: {program()} evaluate {folder}")


def _inspect(args: argparse.Namespace) -> None:
    if args.routing:
        from moedist.inspect_routing import Look, inspect_routing
        look = Look(args.layer, args.segments, args.caches, args.tokens)
        say(inspect_routing(args.run, look, args.overrides, args.step, args.json, args.pictures))
        return
    from moedist.inspect_run import Choice, inspect_run
    choice = Choice(args.layer, args.expert, args.top, args.tokens)
    say(inspect_run(args.run, choice, args.overrides, args.step, args.json, args.pictures))
