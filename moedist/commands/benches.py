"""Measure moedist against others."""

from __future__ import annotations

import argparse

from moedist.commands.parsing import add_command, not_negative, positive

EXAMPLES = {
    "bench layer": "example:\n  moedist bench layer --shapes fine --dtypes fp32 --json layer.json\n"
                   "  moedist bench layer --compressed --json compressed.json\n",
    "bench balance": "examples:\n  moedist bench balance --json balance.json\n"
                     "  moedist bench balance router.balance_loss=0 --timed 0 --seeds 0 1 2\n",
    "bench hetero": "example:\n  moedist bench hetero --json hetero.json\n",
    "bench checkpoint": "example:\n  moedist bench checkpoint --json checkpoint.json\n"
                        "  torchrun --nproc-per-node 2 -m moedist bench checkpoint --folder /scratch\n",
    "bench dispatch": "examples:\n  moedist bench dispatch --json dispatch.json     (starts mpirun here, on 2 and 4 ranks)\n"
                      "  srun --mpi=pmi2 -N 2 python -m moedist bench dispatch\n",
    "bench link": "examples:\n  moedist bench link --json link.json     (as root: two namespaces and a link of 1 Gbit/s)\n"
                  "  torchrun --nnodes 2 --nproc-per-node 1 ... -m moedist bench link     (over the link between two hosts)\n",
    "bench logging": "example:\n  torchrun --nproc-per-node 2 -m moedist bench logging --json logging.json\n",
    "bench offload": "example:\n  moedist bench offload runs/quickstart-20260101-120000 --methods bits=3+budget=3.75+top_n=1 "
                     "--cache 0.25 0.5\n",
    "bench planner": "example:\n  moedist bench planner --json planner.json\n",
    "bench routers": "examples:\n  moedist bench routers --out routers --json routers.json\n"
                     "  moedist bench routers --quick --routers topk,hash,topk+bias_rate=0.01+balance_loss=0\n"
                     "  moedist bench routers --out wikitext data.source=files data.path=WIKITEXT_FOLDER model.top_k=4\n",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    bench = commands.add_parser("bench", help="measure moedist against others").add_subparsers(
        dest="bench", required=True, metavar="BENCH")
    layer = add_command(bench, "layer", "the MoE layer against Hugging Face, DeepSpeed and a dense layer", _bench_layer,
                         EXAMPLES["bench layer"])
    layer.add_argument("--shapes", nargs="+", default=["coarse", "fine"], choices=["coarse", "fine", "tiny"])
    layer.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    layer.add_argument("--rounds", type=int, default=15, help="timed rounds, all implementations in turn")
    layer.add_argument("--compressed", action="store_true",
                       help="instead: the experts of the coarse shape compressed at 70 %% against the same uncompressed")
    layer.add_argument("--json", help="write the figures to this file")

    balance = add_command(bench, "balance", "balancing by a loss, with a bias, and to the ranks' speeds",
                          _bench_balance, EXAMPLES["bench balance"])
    balance.add_argument("overrides", nargs="*", help="section.key=value of the two that have a bias")
    balance.add_argument("--steps", type=positive(int), default=800, help="of each training at full speed (default 800)")
    balance.add_argument("--timed", type=not_negative(int), default=20, help="slowed down, after that (default 20)")
    balance.add_argument("--rate", type=float, default=0.003, help="router.bias_rate (default 0.003)")
    balance.add_argument("--seeds", type=not_negative(int), nargs="+", default=[0], help="one comparison each (default 0)")
    balance.add_argument("--json", help="write the figures to this file")

    hetero = add_command(bench, "hetero", "training on ranks of four speeds: measured plan against equal placement",
                         _bench_hetero, EXAMPLES["bench hetero"])
    hetero.add_argument("--settle", type=not_negative(int), default=300, help="steps at full speed before both trainings")
    hetero.add_argument("--warmup", type=not_negative(int), default=30, help="steps before the measured ones")
    hetero.add_argument("--steps", type=not_negative(int), default=40, help="measured steps of each training")
    hetero.add_argument("--json", help="write the figures to this file")

    checkpoint = add_command(bench, "checkpoint", "how long a checkpoint keeps training waiting, in the background or not",
                             _bench_checkpoint, EXAMPLES["bench checkpoint"])
    checkpoint.add_argument("--rounds", type=positive(int), default=3, help="saves by each way, in turn")
    checkpoint.add_argument("--folder", help="write there (default: here); needs room for two checkpoints of 1.2 GB")
    checkpoint.add_argument("--json", help="write the figures to this file")

    dispatch = add_command(bench, "dispatch", "rows between ranks by MPI, gloo and over islands", _bench_dispatch,
                           EXAMPLES["bench dispatch"])
    dispatch.add_argument("--ranks", type=positive(int), nargs="+", default=[2, 4], help="ranks to start (default 2 4)")
    dispatch.add_argument("--rounds", type=positive(int), default=20, help="timed rounds, all transports in turn")
    dispatch.add_argument("--steps", type=not_negative(int), default=10,
                          help="of each training over a link of 1 Gbit/s, see bench link (default 10; 0: none)")
    dispatch.add_argument("--json", help="write the figures to this file")

    link = add_command(bench, "link", "training over a link of 1 Gbit/s: islands, dedup and int8 against plain rows",
                       _bench_link, EXAMPLES["bench link"])
    link.add_argument("--steps", type=positive(int), default=10, help="measured steps of each training (default 10)")
    link.add_argument("--json", help="write the figures to this file")
    logging = add_command(bench, "logging", "what metrics, alerts and Weights & Biases cost a training step", _bench_logging,
                          EXAMPLES["bench logging"])
    logging.add_argument("--steps", type=positive(int), default=60, help="measured steps (default 60)")
    logging.add_argument("--log-every", type=positive(int), default=10, help="steps between metrics (default 10)")
    logging.add_argument("--json", help="write the figures to this file")
    offload = add_command(bench, "offload", "a run's experts outside the device, in 16 and in few bits", _bench_offload,
                          EXAMPLES["bench offload"])
    offload.add_argument("run", help="run folder, its experts dense")
    offload.add_argument("overrides", nargs="*", help="section.key=value")
    offload.add_argument("--methods", metavar="NAMES", help="ways separated by commas, such as bits=3+budget=3.75+top_n=1")
    offload.add_argument("--cache", type=float, nargs="+", default=[0.25], metavar="SHARE",
                         help="of the experts' bytes that the device holds (default 0.25)")
    offload.add_argument("--tokens", type=positive(int), default=24, help="to decode (default 24)")
    offload.add_argument("--context", type=positive(int), default=8, help="tokens seen in each pass (default 8)")
    offload.add_argument("--read", type=float, default=0.05, metavar="GIB_S", help="declared limit of reading (default 0.05)")
    offload.add_argument("--store", choices=["disk", "ram"], default="disk")
    offload.add_argument("--policy", choices=["lru", "score"], default="lru")
    offload.add_argument("--prefetch", type=not_negative(int), default=2, help="experts read ahead (default 2)")
    offload.add_argument("--watch", type=positive(int), default=16384, help="training tokens that the experts are watched on")
    offload.add_argument("--rounds", type=positive(int), default=3, help="all ways in turn, medians (default 3)")
    offload.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    offload.add_argument("--json", help="write the figures to this file")

    planner = add_command(bench, "planner", "placements over the bound, and the time that planning takes", _bench_planner,
                         EXAMPLES["bench planner"])
    planner.add_argument("--quick", action="store_true", help="a few small problems only")
    planner.add_argument("--json", help="write the figures to this file")

    routers = add_command(bench, "routers", "every router, trained alike: balance, speed, diversity, stability, perplexity",
                          _bench_routers, EXAMPLES["bench routers"])
    routers.add_argument("overrides", nargs="*", help="section.key=value, of the model and training that all have in common")
    routers.add_argument("--routers", metavar="NAMES", help="separated by commas, with options such as "
                         "topk+bias_rate=0.01+balance_loss=0 (default: all)")
    routers.add_argument("--quick", action="store_true", help="a small model, few steps and one seed: three minutes")
    routers.add_argument("--seeds", type=positive(int), help="trainings of each router (default 3)")
    routers.add_argument("--steps", type=positive(int), help="of each training (default 300)")
    routers.add_argument("--workers", type=positive(int), help="trainings at a time, each with one thread (default: as many "
                         "as there are cores)")
    routers.add_argument("--out", metavar="FOLDER", help="write table.md, table.csv, pictures and the trained models there; "
                         "the same command goes on where it was cut off")
    routers.add_argument("--json", help="write the figures to this file")


def _bench_layer(args: argparse.Namespace) -> None:
    from moedist.bench.layer import bench_layer
    if args.compressed:
        from moedist.bench.compressed import bench_compressed
        bench_compressed(args.rounds, args.json)
    else:
        bench_layer(args.shapes, args.dtypes, args.rounds, args.json)


def _bench_balance(args: argparse.Namespace) -> None:
    from moedist.bench.balance import bench_balance
    bench_balance(args.steps, args.timed, args.rate, args.json, args.seeds, args.overrides)


def _bench_hetero(args: argparse.Namespace) -> None:
    from moedist.bench.hetero import bench_hetero
    bench_hetero(args.settle, args.warmup, args.steps, args.json)


def _bench_checkpoint(args: argparse.Namespace) -> None:
    from moedist.bench.checkpoint import bench_checkpoint
    bench_checkpoint(args.rounds, args.folder, args.json)


def _bench_dispatch(args: argparse.Namespace) -> None:
    from moedist.bench.dispatch import bench_dispatch
    bench_dispatch(args.ranks, args.rounds, args.steps, args.json)


def _bench_link(args: argparse.Namespace) -> None:
    from moedist.bench.slow_link import bench_slow_link
    bench_slow_link(args.steps, args.json)


def _bench_logging(args: argparse.Namespace) -> None:
    from moedist.bench.logging import bench_logging
    bench_logging(args.steps, args.log_every, args.json)


def _bench_offload(args: argparse.Namespace) -> None:
    from moedist.compressing.offload_bench import VARIANTS, bench_offload
    bench_offload(args.run, args.methods.split(",") if args.methods else VARIANTS, args.cache, args.tokens, args.context,
                  args.read, args.store, args.policy, args.prefetch, args.watch, args.rounds, args.overrides, args.step,
                  args.json)


def _bench_planner(args: argparse.Namespace) -> None:
    from moedist.bench.planner import bench_planner
    bench_planner(args.quick, args.json)


def _bench_routers(args: argparse.Namespace) -> None:
    from moedist.bench.routers import bench_routers
    bench_routers(args.routers.split(",") if args.routers else None, args.quick, args.seeds, args.steps, args.workers,
                  args.out, args.json, args.overrides)
