"""Measure ranks, and show plans for them."""

from __future__ import annotations

import argparse

from moedist.commands.parsing import add_command, not_negative

EXAMPLES = {
    "probe": """examples:
  moedist probe configs/quickstart.yaml --json ranks.json                (one rank)
  torchrun --nproc-per-node 2 -m moedist probe configs/quickstart.yaml --yaml cluster.yaml
  torchrun --nproc-per-node 4 -m moedist probe configs/quickstart.yaml --links 'world.islands=[0,0,1,1]'
  moedist plan configs/quickstart.yaml --cluster cluster.yaml            (then: ask what a larger cluster would do)
""",
    "plan": """examples:
  moedist plan configs/quickstart.yaml --cluster configs/clusters/mixed.yaml
  torchrun --nproc-per-node 2 -m moedist plan configs/quickstart.yaml
""",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    probe = add_command(commands, "probe", "measure the ranks: speeds, links, memory", _probe, EXAMPLES["probe"])
    probe.add_argument("config", help="YAML file; shapes and dtype are what it says")
    probe.add_argument("overrides", nargs="*", help="section.key=value")
    probe.add_argument("--links", action="store_true",
                       help="instead: send known bytes over the links between ranks, both ways, and name broken or slow ones")
    probe.add_argument("--yaml", help="write what was measured as a cluster file, for moedist plan --cluster")
    probe.add_argument("--json", help="write what was measured of every rank (or link) to this file")

    plan = add_command(commands, "plan", "show a placement and why, for this machine or a cluster that is not here", _plan,
                       EXAMPLES["plan"], _kinds_help)
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", help="section.key=value")
    plan.add_argument("--cluster", metavar="YAML",
                      help="kinds of ranks, see configs/clusters/ (default: measure this machine)")
    plan.add_argument("--zipf", type=not_negative(float), default=0.6, metavar="S",
                      help="expert i gets rows in proportion to (i + 1)^-S (default 0.6; 0: all alike)")
    plan.add_argument("--run", help="take the loads of this run's newest checkpoint instead")
    plan.add_argument("--json", help="write the plan and the predictions to this file")


def _kinds_help() -> str:
    from moedist.config import describe_fields
    from moedist.coordinator.cluster_file import Kind
    return f"\nkeys of each of the kinds of a cluster file:\n{describe_fields(Kind)}\n"


def _probe(args: argparse.Namespace) -> None:
    if args.links:
        from moedist.show_links import show_links
        show_links(args.config, args.overrides, args.json)
        return
    from moedist.show_probe import show_probe
    show_probe(args.config, args.overrides, args.yaml, args.json)


def _plan(args: argparse.Namespace) -> None:
    from moedist.show_plan import show_plan
    show_plan(args.config, args.overrides, args.cluster, args.zipf, args.run, args.json)
