"""Look at runs: a report page, a dashboard."""

from __future__ import annotations

import argparse
from pathlib import Path

from moedist.commands.parsing import add_command, not_negative, positive, say

EXAMPLES = {
    "report": """examples:
  moedist report runs/quickstart-20260101-120000                 (writes report.html into the run folder)
  moedist report runs/a-... runs/b-... --out compared.html
  moedist report runs/quickstart-20260101-120000 --serve         (follows a run that is going on)
""",
    "dashboard": """examples:
  moedist dashboard --entity my-team --project moedist           (needs a key: wandb login)
  moedist dashboard --json dashboard.json                        (only writes what would be sent)
""",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    report = add_command(commands, "report", "runs as one HTML page that opens from disk, without a network", _report,
                         EXAMPLES["report"])
    report.add_argument("run", nargs="+", help="run folders")
    report.add_argument("--out", help="write this file (default: report.html in the first run folder)")
    report.add_argument("--serve", action="store_true", help="serve the page, and follow the runs, instead of writing it")
    report.add_argument("--host", default="127.0.0.1", help="with --serve: address to listen on (default: this machine only)")
    report.add_argument("--port", type=not_negative(int), default=8642, help="with --serve (default 8642; 0: any free one)")
    report.add_argument("--refresh", type=positive(float), default=5.0, metavar="SECONDS",
                        help="with --serve: between looks at the runs (default 5)")

    dashboard = add_command(commands, "dashboard", "make a Weights & Biases dashboard for the metrics of runs", _dashboard,
                            EXAMPLES["dashboard"])
    dashboard.add_argument("--entity", help="Weights & Biases user or team (default: that of the key)")
    dashboard.add_argument("--project", default="moedist", help="Weights & Biases project (default moedist)")
    dashboard.add_argument("--name", default="moedist", help="name of the dashboard (default moedist)")
    dashboard.add_argument("--ranks", type=positive(int), default=4, help="ranks that get lines of their own (default 4)")
    dashboard.add_argument("--json", help="write what would be sent to this file, and send nothing")


def _report(args: argparse.Namespace) -> None:
    from moedist.report import read_run, serve, write_report
    if args.serve:
        serve(args.run, args.host, args.port, args.refresh)
        return
    path = Path(args.out) if args.out else Path(args.run[0]) / "report.html"
    write_report([read_run(run) for run in args.run], path)
    say(f"written: {path}")


def _dashboard(args: argparse.Namespace) -> None:
    from moedist.monitor.dashboard import make_dashboard
    say(make_dashboard(args.entity, args.project, args.name, args.ranks, args.json))
