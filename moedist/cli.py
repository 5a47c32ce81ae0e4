"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import Callable, NoReturn, Sequence

from moedist.errors import ConfigError, MoedistError, WorldError
from moedist.faults import current_watch, is_lost_rank

EXAMPLES = {
    "train": """examples:
  torchrun --nproc-per-node 2 -m moedist train configs/quickstart.yaml
  moedist train configs/quickstart.yaml placement.counts=null placement.batch_shares=null   (one rank)
  moedist train --resume runs/quickstart-20260101-120000     (that run)
  moedist train configs/quickstart.yaml --resume             (the newest run of this name)
""",
    "evaluate": "example:\n  moedist evaluate runs/quickstart-20260101-120000 --split test\n",
    "generate": "example:\n  moedist generate runs/quickstart-20260101-120000 --prompt 'def read(' --max-tokens 60\n",
    "probe": """examples:
  moedist probe configs/quickstart.yaml --json ranks.json                (one rank)
  torchrun --nproc-per-node 2 -m moedist probe configs/quickstart.yaml --yaml cluster.yaml
  moedist plan configs/quickstart.yaml --cluster cluster.yaml            (then: ask what a larger cluster would do)
""",
    "compress": """examples:
  moedist compress runs/quickstart-20260101-120000 --ratio 0.7
  moedist compress runs/quickstart-20260101-120000 --sweep 0.5,0.7 --methods cur,svd-whitened --out sweep
  moedist compress runs/quickstart-20260101-120000 --heal 30 --methods cur,cur-hybrid --ratio 0.7
""",
    "inspect": """examples:
  moedist inspect runs/quickstart-20260101-120000 --pictures pictures
  moedist inspect runs/quickstart-20260101-120000 --layer 0 --expert 3 --top 10 --json inspect.json
""",
    "plan": """examples:
  moedist plan configs/quickstart.yaml --cluster configs/clusters/mixed.yaml
  torchrun --nproc-per-node 2 -m moedist plan configs/quickstart.yaml placement.counts=null placement.batch_shares=null
""",
    "import-hf": """examples:
  torchrun --nproc-per-node 2 -m moedist import-hf Qwen/Qwen3-30B-A3B-Base --name qwen data.source=files data.path=texts
  moedist import-hf models/llama --upcycle experts=8,top_k=2,granularity=4      (dense -> 32 experts a quarter as wide)
then: moedist train --resume RUN
""",
    "export-hf": "example:\n  moedist export-hf runs/quickstart-20260101-120000 exported --dtype bfloat16 --step 300\n",
    "bench layer": "example:\n  moedist bench layer --shapes fine --dtypes fp32 --json layer.json\n"
                   "  moedist bench layer --compressed --json compressed.json\n",
    "bench hetero": "example:\n  moedist bench hetero --json hetero.json\n",
    "bench planner": "example:\n  moedist bench planner --json planner.json\n",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="moedist", description="Train Mixture-of-Experts language models over ranks "
                                     "that are not alike.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a configuration, or go on with a run", _train, show_keys=True)
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("overrides", nargs="*", help="section.key=value")
    train.add_argument("--resume", nargs="?", const="newest", metavar="RUN",
                       help="go on with this run folder; without RUN, with the newest run of the configuration's name")
    train.add_argument("--check", action="store_true", help="check the configuration for this number of ranks and stop")
    train.add_argument("--ranks", type=int, help="with --check: number of ranks (default: as launched)")

    evaluate = _command(commands, "evaluate", "perplexity of a run on a held-out split", _evaluate)
    evaluate.add_argument("run", help="run folder")
    evaluate.add_argument("overrides", nargs="*", help="section.key=value")
    evaluate.add_argument("--split", default="valid", choices=["train", "valid", "test"])
    evaluate.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")

    generate = _command(commands, "generate", "continue prompts with a trained run", _generate)
    generate.add_argument("run", help="run folder")
    generate.add_argument("overrides", nargs="*", help="section.key=value")
    generate.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    generate.add_argument("--max-tokens", type=_not_negative(int), default=100)
    generate.add_argument("--temperature", type=_not_negative(float), default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=_not_negative(int), default=50, help="draw among the k likeliest tokens (0: all)")
    generate.add_argument("--seed", type=int, default=0)

    probe = _command(commands, "probe", "measure the ranks: speeds, links, memory", _probe)
    probe.add_argument("config", help="YAML file; shapes and dtype are what it says")
    probe.add_argument("overrides", nargs="*", help="section.key=value")
    probe.add_argument("--yaml", help="write what was measured as a cluster file, for moedist plan --cluster")
    probe.add_argument("--json", help="write what was measured of every rank to this file")

    inspect = _command(commands, "inspect", "what a run's experts do, neuron by neuron, and what compression kept of them",
                       _inspect)
    inspect.add_argument("run", help="run folder")
    inspect.add_argument("overrides", nargs="*", help="section.key=value")
    inspect.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    inspect.add_argument("--layer", type=int, nargs="+", metavar="I", help="only these layers (default: all with experts)")
    inspect.add_argument("--expert", type=int, nargs="+", metavar="E",
                         help="neurons of these experts (default: all in the JSON, the foremost of each layer in the tables)")
    inspect.add_argument("--tokens", type=_positive(int), default=16384, metavar="N",
                         help="validation tokens to watch the experts on (default 16384)")
    inspect.add_argument("--top", type=_positive(int), default=5, metavar="K",
                         help="neurons told in full, of each expert, by Fisher score (default 5)")
    inspect.add_argument("--json", help="write everything to this file")
    inspect.add_argument("--pictures", metavar="FOLDER", help="draw PNG pictures into this folder")

    plan = _command(commands, "plan", "show a placement and why, for this machine or a cluster that is not here", _plan)
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", help="section.key=value")
    plan.add_argument("--cluster", metavar="YAML", help="kinds of ranks, see configs/clusters/ (default: measure this machine)")
    plan.add_argument("--zipf", type=_not_negative(float), default=0.6, metavar="S",
                      help="expert i gets rows in proportion to (i + 1)^-S (default 0.6; 0: all alike)")
    plan.add_argument("--run", help="take the loads of this run's newest checkpoint instead")
    plan.add_argument("--json", help="write the plan and the predictions to this file")

    compress = _command(commands, "compress", "make the experts of a run's checkpoint smaller, or compare methods", _compress)
    compress.add_argument("run", help="run folder")
    compress.add_argument("overrides", nargs="*", help="section.key=value")
    compress.add_argument("--method", default="cur", help="how (default cur; moedist.compress lists all)")
    compress.add_argument("--ratio", type=float, default=0.5, help="share of the experts' bytes to remove (default 0.5)")
    compress.add_argument("--option", action="append", default=[], metavar="KEY=VALUE",
                          help="another key of a compress phase, such as budget=uniform, or options.least_squares=false")
    compress.add_argument("--name", help="of the new run (default: that of the old and the method)")
    compress.add_argument("--sweep", nargs="?", const="", metavar="RATIOS",
                          help="write no run; show perplexity after each method at these ratios (0.2,0.4,...)")
    compress.add_argument("--heal", type=int, metavar="STEPS",
                          help="write no run; train on for so many steps after each of --methods at --ratio, and without")
    compress.add_argument("--dense", action="store_true",
                          help="write a run whose compressed experts are dense again, in their old shape, the dropped part zero")
    compress.add_argument("--methods", metavar="NAMES",
                          help="with --sweep (default: all) and --heal (default: --method): separated by commas")
    compress.add_argument("--tokens", type=int, default=65536, help="training tokens that the experts are watched on")
    compress.add_argument("--split", default="valid", choices=["train", "valid", "test"], help="with --sweep: evaluated on it")
    compress.add_argument("--eval-tokens", type=int, help="with --sweep: of the split (default: as in training)")
    compress.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    compress.add_argument("--out", metavar="FOLDER", help="with --sweep: write sweep.csv and sweep.png there")
    compress.add_argument("--json", help="with --sweep and --heal: write the figures to this file")

    importing = _command(commands, "import-hf", "make a run of a model in Hugging Face's format", _import_hf)
    importing.add_argument("model", help="a folder, or OWNER/NAME on the Hub: Mixtral, Qwen3-MoE, OLMoE; with --upcycle "
                                         "Llama, Mistral, Qwen3")
    importing.add_argument("overrides", nargs="*", help="section.key=value of the run's configuration")
    importing.add_argument("--name", help="name of the run (default: that of the model)")
    importing.add_argument("--folder", default="runs", help="folder that run folders are made in")
    importing.add_argument("--upcycle", metavar="experts=8,top_k=2", help="make experts of a dense model; also granularity "
                           "(shards of each copy), noise (over the weights' deviation), shared (0 or 1), every (n-th block)")

    exporting = _command(commands, "export-hf", "write a run's model in Hugging Face's format", _export_hf)
    exporting.add_argument("run", help="run folder")
    exporting.add_argument("target", metavar="folder", help="folder to write, not there yet or empty")
    exporting.add_argument("overrides", nargs="*", help="section.key=value")
    exporting.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    exporting.add_argument("--dtype", default="keep", choices=["keep", "float32", "bfloat16", "float16"], help="of weights")
    exporting.add_argument("--architecture", help="mixtral, qwen3_moe or olmoe (default: the one that fits)")
    exporting.add_argument("--shard-gib", type=_positive(float), default=4.0, help="largest file of weights")

    bench = commands.add_parser("bench", help="measure moedist against others").add_subparsers(
        dest="bench", required=True, metavar="BENCH")
    layer = _command(bench, "layer", "the MoE layer against Hugging Face, DeepSpeed and a dense layer", _bench_layer,
                     example="bench layer")
    layer.add_argument("--shapes", nargs="+", default=["coarse", "fine"], choices=["coarse", "fine", "tiny"])
    layer.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    layer.add_argument("--rounds", type=int, default=15, help="timed rounds, all implementations in turn")
    layer.add_argument("--compressed", action="store_true",
                       help="instead: the experts of the coarse shape compressed at 70 %% against the same uncompressed")
    layer.add_argument("--json", help="write the figures to this file")

    hetero = _command(bench, "hetero", "training on ranks of four speeds: measured plan against equal placement", _bench_hetero,
                      example="bench hetero")
    hetero.add_argument("--settle", type=_not_negative(int), default=300, help="steps at full speed before both trainings")
    hetero.add_argument("--warmup", type=_not_negative(int), default=30, help="steps before the measured ones")
    hetero.add_argument("--steps", type=_not_negative(int), default=40, help="measured steps of each training")
    hetero.add_argument("--json", help="write the figures to this file")

    planner = _command(bench, "planner", "placements over the bound, and the time that planning takes", _bench_planner,
                       example="bench planner")
    planner.add_argument("--quick", action="store_true", help="a few small problems only")
    planner.add_argument("--json", help="write the figures to this file")
    return parser


def _not_negative(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (value := kind(text)) < 0:
            raise argparse.ArgumentTypeError(f"{text} is below 0")
        return value

    return parse


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def _command(commands: argparse._SubParsersAction, name: str, text: str, run: Callable, show_keys: bool = False,
             example: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                 formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES[example or name])
    if show_keys:
        plain_help = parser.format_help
        parser.format_help = lambda: plain_help() + _keys_help()
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    parser.set_defaults(handler=run)
    return parser


def _keys_help() -> str:
    from moedist.config import describe_keys
    return f"\nconfiguration keys (section.key=default):\n{describe_keys()}\n"


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


def _train(args: argparse.Namespace) -> None:
    if args.config is None and args.resume in (None, "newest"):
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
        if config.data.source == "files":
            from moedist.data import source_splits
            source_splits(config.data)  # refuses a missing path and a folder without text
        plan, _ = written_plan(config, ranks, None)
        print(f"{args.config} is fine for {ranks} rank(s); "
              + (f"plan {plan.sha256[:12]}" if plan else "they will be measured, then planned for"))
        return
    from moedist.trainer import train
    train(args.config, args.overrides, args.resume)


def _evaluate(args: argparse.Namespace) -> None:
    from moedist.evaluate import evaluate
    result, step = evaluate(args.run, args.split, args.overrides, args.step)
    _say(f"{args.run} step {step}: {args.split} loss {result.loss:.4f}, perplexity {result.perplexity:.2f} per token "
         f"({result.tokens} tokens)")


def _generate(args: argparse.Namespace) -> None:
    from moedist.generate import generate
    texts = generate(args.run, args.prompt, args.max_tokens, args.temperature, args.top_k, args.seed, args.overrides)
    _say("\n---\n".join(texts))


def _probe(args: argparse.Namespace) -> None:
    from moedist.show_probe import show_probe
    show_probe(args.config, args.overrides, args.yaml, args.json)


def _inspect(args: argparse.Namespace) -> None:
    from moedist.inspect_run import Choice, inspect_run
    choice = Choice(args.layer, args.expert, args.top, args.tokens)
    _say(inspect_run(args.run, choice, args.overrides, args.step, args.json, args.pictures))


def _plan(args: argparse.Namespace) -> None:
    from moedist.show_plan import show_plan
    show_plan(args.config, args.overrides, args.cluster, args.zipf, args.run, args.json)


def _compress(args: argparse.Namespace) -> None:
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
        heal_run(args.run, methods, args.ratio, args.heal, args.tokens, args.overrides, args.step, args.json)
        return
    if args.dense:
        _say(f"written: {dense_run(args.run, args.overrides, args.step, args.name)}")
        return
    c = compress_options(args.method, args.ratio, args.tokens, args.option)
    folder = compress_run(args.run, c, args.overrides, args.step, args.name)
    _say(f"next: moedist evaluate {folder}   or, to train on: moedist train --resume {folder}")


def _import_hf(args: argparse.Namespace) -> None:
    from moedist.huggingface import import_run
    folder = import_run(args.model, args.name, args.folder, args.overrides, args.upcycle)
    _say(f"imported: {folder}\nnext: moedist generate {folder} --prompt \"Once\"   or, to train it: moedist train --resume "
         f"{folder}")


def _export_hf(args: argparse.Namespace) -> None:
    from moedist.huggingface import export_run
    lines = export_run(args.run, args.target, args.overrides, args.step, args.dtype, args.architecture, args.shard_gib)
    _say("\n".join(lines))


def _bench_layer(args: argparse.Namespace) -> None:
    from moedist.bench.layer import bench_layer
    if args.compressed:
        from moedist.bench.compressed import bench_compressed
        bench_compressed(args.rounds, args.json)
    else:
        bench_layer(args.shapes, args.dtypes, args.rounds, args.json)


def _bench_hetero(args: argparse.Namespace) -> None:
    from moedist.bench.hetero import bench_hetero
    bench_hetero(args.settle, args.warmup, args.steps, args.json)


def _bench_planner(args: argparse.Namespace) -> None:
    from moedist.bench.planner import bench_planner
    bench_planner(args.quick, args.json)


def _launched_ranks() -> int:
    from moedist.world import find_launch  # imports torch
    return find_launch().size


def _say(text: str) -> None:
    """Print once, whatever the number of ranks."""
    from moedist.world import find_launch
    if find_launch().rank == 0:
        print(text)


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
        _fail(text, same_on_all_ranks=not isinstance(error, WorldError))
    words = watch.last_words(error, " ".join(text.split()))
    if words is not None:
        if debug or not (mendable or is_lost_rank(error)):
            traceback.print_exception(error)
        print(f"moedist: error: {words}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)  # the others wait for nothing of this process, and its clean-up may wait for them


def _fail(text: str, same_on_all_ranks: bool = False) -> None:
    """Print an error on one line and end with exit code 1; once a machine where its ranks meet the same one."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    speaks = os.environ.get("LOCAL_RANK", "0") == "0" if same_on_all_ranks else True
    if speaks:
        prefix = "" if size == "1" or rank == "0" else f"rank {rank}: "
        print(f"moedist: error: {prefix}{text}", file=sys.stderr, flush=True)
    sys.exit(1)
