"""Models in Hugging Face's format."""

from __future__ import annotations

import argparse

from moedist.commands.parsing import add_command, positive, say

EXAMPLES = {
    "import-hf": """examples:
  torchrun --nproc-per-node 2 -m moedist import-hf Qwen/Qwen3-30B-A3B-Base --name qwen data.source=files data.path=texts
  moedist import-hf models/llama --upcycle experts=8,top_k=2,granularity=4      (dense -> 32 experts a quarter as wide)
then: moedist train --resume RUN
""",
    "export-hf": "example:\n  moedist export-hf runs/quickstart-20260101-120000 exported --dtype bfloat16 --step 300\n",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    importing = add_command(commands, "import-hf", "make a run of a model in Hugging Face's format", _import_hf,
                            EXAMPLES["import-hf"])
    importing.add_argument("model", help="a folder, or OWNER/NAME on the Hub: Mixtral, Qwen3-MoE, OLMoE; with --upcycle "
                                         "Llama, Mistral, Qwen3")
    importing.add_argument("overrides", nargs="*", help="section.key=value of the run's configuration")
    importing.add_argument("--name", help="name of the run (default: that of the model)")
    importing.add_argument("--folder", default="runs", help="folder that run folders are made in")
    importing.add_argument("--upcycle", metavar="experts=8,top_k=2", help="make experts of a dense model; also granularity "
                           "(shards of each copy), noise (over the weights' deviation), shared (0 or 1), every (n-th block)")

    exporting = add_command(commands, "export-hf", "write a run's model in Hugging Face's format", _export_hf,
                            EXAMPLES["export-hf"])
    exporting.add_argument("run", help="run folder")
    exporting.add_argument("target", metavar="folder", help="folder to write, not there yet or empty")
    exporting.add_argument("overrides", nargs="*", help="section.key=value")
    exporting.add_argument("--step", type=int, help="checkpoint of this step (default: the newest)")
    exporting.add_argument("--dtype", default="keep", choices=["keep", "float32", "bfloat16", "float16"], help="of weights")
    exporting.add_argument("--architecture", help="mixtral, qwen3_moe or olmoe (default: the one that fits)")
    exporting.add_argument("--shard-gib", type=positive(float), default=4.0, help="largest file of weights")


def _import_hf(args: argparse.Namespace) -> None:
    from moedist.huggingface import import_run
    folder = import_run(args.model, args.name, args.folder, args.overrides, args.upcycle)
    from moedist.trainer import program
    say(f"imported: {folder}\nnext: {program()} generate {folder} --prompt \"Once\"   or, to train it: {program()} train "
        f"--resume {folder}")


def _export_hf(args: argparse.Namespace) -> None:
    from moedist.huggingface import export_run
    lines = export_run(args.run, args.target, args.overrides, args.step, args.dtype, args.architecture, args.shard_gib)
    say("\n".join(lines))
