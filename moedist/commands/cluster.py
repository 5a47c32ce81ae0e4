"""Submit to Slurm, and look after what was submitted."""

from __future__ import annotations

import argparse
import shlex
import sys

from moedist.commands.parsing import add_command
from moedist.errors import ConfigError

JOB = "folder name or Slurm's number; NAME/1 or NUMBER_1 is one training of a sweep"
EXAMPLES = {
    "submit": """examples:
  moedist submit configs/quickstart.yaml --cluster slurm/clusters/mixed-hetjob.yaml --dry-run
  moedist submit configs/quickstart.yaml --cluster slurm/clusters/mixed-hetjob.yaml --check
  moedist submit configs/quickstart.yaml --cluster slurm/clusters/mixed-hetjob.yaml train.lr=1e-3 --follow
  moedist submit configs/quickstart.yaml --cluster slurm/clusters/nvidia.yaml --each seed=0 --each "seed=1 train.lr=1e-3"
then: moedist jobs
""",
    "jobs": """examples:
  moedist jobs
  moedist jobs quickstart-20260101-120000 --follow
  moedist jobs quickstart-20260101-120000/1 --follow     (one training of a sweep)
""",
    "cancel": """examples:
  moedist cancel quickstart-20260101-120000     (or Slurm's number)
  moedist cancel quickstart-20260101-120000/1   (one training of a sweep)
""",
    "resize": """examples:
  moedist resize quickstart-20260101-120000 --nodes amd=1              (it goes on from its checkpoint)
  moedist resize quickstart-20260101-120000/1 --fit --time 12:00:00    (one training of a sweep)
""",
}


def add(commands: argparse._SubParsersAction) -> None:
    """The commands of this file."""
    submit = add_command(commands, "submit", "submit a training to Slurm, or run it as it would be", _submit,
                         EXAMPLES["submit"], _profile_help)
    submit.add_argument("config", help="YAML file")
    submit.add_argument("overrides", nargs="*", help="section.key=value")
    submit.add_argument("--cluster", required=True, metavar="YAML", help="site profile, see slurm/clusters/")
    submit.add_argument("--nodes", action="append", default=[], metavar="KIND=N",
                        help="other number of nodes of a kind than the profile's; 0: without it")
    submit.add_argument("--time", help="other time limit than the profile's")
    submit.add_argument("--each", action="append", metavar="'KEY=VALUE ...'",
                        help="a sweep: one training with each of these overrides; may be given several times")
    way = submit.add_mutually_exclusive_group()
    way.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    way.add_argument("--local", action="store_true", help="run it on this machine, all ranks, and show the log")
    way.add_argument("--check", action="store_true",
                     help="instead, a job of two minutes at most that tells what would break the run")
    way.add_argument("--follow", action="store_true", help="show rank 0's log until the job has ended")

    jobs = add_command(commands, "jobs", "list jobs: state, step, loss, nodes", _jobs, EXAMPLES["jobs"])
    jobs.add_argument("job", nargs="*", help=f"only these: {JOB}")
    jobs.add_argument("--follow", action="store_true",
                      help="show rank 0's log of one job until it has ended; of a sweep, of all its trainings")

    cancel = add_command(commands, "cancel", "cancel a job; its ranks save a checkpoint first", _cancel, EXAMPLES["cancel"])
    cancel.add_argument("job", help=JOB)

    resize = add_command(commands, "resize", "submit a job that waits or has ended anew, on other numbers of nodes", _resize,
                         EXAMPLES["resize"])
    resize.add_argument("job", help=JOB)
    numbers = resize.add_mutually_exclusive_group()
    numbers.add_argument("--nodes", action="append", default=[], metavar="KIND=N",
                         help="number of nodes of a kind; 0: without it (default: as they were)")
    numbers.add_argument("--fit", action="store_true", help="as many nodes as are idle now, down to each kind's min_nodes")
    resize.add_argument("--time", help="other time limit than it had")
    resize.add_argument("--follow", action="store_true", help="show rank 0's log until the job has ended")
    for command in (jobs, cancel, resize):
        command.add_argument("--folder", default="runs", help="folder that run folders are made in (default runs)")


def _profile_help() -> str:
    from moedist.config import describe_fields
    from moedist.submit.profile import NodeKind, Profile
    return f"\nkeys of a site profile:\n{describe_fields(Profile)}\nkeys of each of its kinds:\n{describe_fields(NodeKind)}\n"


def _submit(args: argparse.Namespace) -> None:
    from moedist.submit.submit import Request, dry_run, run_here, show, submit
    each = [shlex.split(text) for text in args.each] if args.each else [[]]
    if stray := [o for own in each for o in own if "=" not in o]:
        raise ConfigError(f"--each takes overrides, section.key=value, not {stray[0]!r}; several in one pair of quotes")
    request = Request(args.config, args.overrides, args.cluster, each, _numbers(args.nodes), args.time)
    if args.dry_run:
        print(dry_run(request))
    elif args.local:
        if failed := run_here(request):
            sys.exit(f"moedist: error: {failed} of {len(each)} trainings failed; what was wrong is above")
    elif args.check:
        from moedist.submit.site_check import check_site
        sys.exit(0 if check_site(request) else 1)
    else:
        sys.exit(0 if show(submit(request).members(), args.follow) else 1)


def _jobs(args: argparse.Namespace) -> None:
    from moedist.submit.listing import find_trainings, show_jobs
    if args.follow:
        from moedist.submit.follow import follow
        from moedist.submit.submit import resize
        if len(args.job) != 1:
            raise ConfigError("--follow shows one job; name it (moedist jobs lists them)")
        sys.exit(0 if follow(find_trainings(args.job[0], args.folder)[1], resize) else 1)
    else:
        print(show_jobs(args.folder, args.job))


def _cancel(args: argparse.Namespace) -> None:
    from moedist.submit.listing import cancel
    print(cancel(args.job, args.folder))


def _resize(args: argparse.Namespace) -> None:
    from moedist.submit.listing import find_trainings
    from moedist.submit.submit import resize, show
    _, members = find_trainings(args.job, args.folder)
    if len(members) > 1:
        raise ConfigError(f"{args.job} is a sweep of {len(members)} trainings; name the one you mean, such as "
                          f"{members[0].label}")
    member = resize(members[0], None if args.fit else _numbers(args.nodes), args.time)
    sys.exit(0 if show([member], args.follow) else 1)


def _numbers(texts: list[str]) -> dict[str, int]:
    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not number.isdigit():
            raise ConfigError(f"--nodes takes KIND=NUMBER, such as amd=1, not {text!r}")
        found[name] = int(number)
    return found
