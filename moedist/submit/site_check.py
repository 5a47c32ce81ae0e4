"""`moedist submit --check`: a short job on every kind of nodes, and what would break a run on them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from typing import Any, Mapping, Sequence

from moedist.config import Config, load_config
from moedist.submit.follow import follow
from moedist.submit.job_folder import JobFolder
from moedist.submit.profile import Profile, read_profile
from moedist.submit.submit import Request, resize, submit
from moedist.text_table import table

LIMIT = "2:00"  # a check takes seconds, but torch may be imported from a file system that nobody has read yet
SLOW_SKEW_S = 2.0
SLOW_LINK = 0.1  # of the fastest kind's bandwidth


def check_site(request: Request) -> bool:
    """Run the check, and print what was found.

    Returns:
        Whether nothing would break a run.
    """
    limit = request.time or LIMIT
    folder = submit(replace(request, time=limit, each=((),)), check=True)
    follow(folder.members(), resize)
    found = read_facts(folder)
    profile, config = read_profile(folder.profile), load_config(request.config, request.overrides)
    problems, remarks = judge(found, profile, config, folder.read().tasks)
    if problems:
        folder.problems.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    print(_table(found))
    for line in remarks:
        print(f"note: {line}")
    for line in problems:
        print(f"problem: {line}")
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}; all that ranks have said is in {folder}")
    else:
        print("nothing that would break the run was found")
        shutil.rmtree(folder.path)
    return not problems


def read_facts(folder: JobFolder) -> list[dict[str, Any]]:
    """Of all ranks that have said something, by rank; see `moedist.submit.check_task.RankSeen`."""
    files = (folder.path / "check").glob("*.json")
    return sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda facts: facts["rank"])


def judge(found: Sequence[Mapping[str, Any]], profile: Profile, config: Config, tasks: int) -> tuple[list[str], list[str]]:
    """What would break the run, and what is worth a word.

    Args:
        found: facts of ranks; tasks: how many ranks there should be.
    """
    problems: list[str] = []
    if missing := sorted(set(range(tasks)) - {facts["rank"] for facts in found}):
        problems.append(f"rank{'s' if len(missing) > 1 else ''} {_ranks(missing)} said nothing: the environment of that kind "
                        f"does not start within {profile.time} (--time gives it longer), or does not see the job's folder; "
                        "see the logs")
    problems += list(dict.fromkeys(facts["problem"] for facts in found if facts["problem"] and not facts["met"]))
    for text in dict.fromkeys(facts["problem"] for facts in found if facts["problem"] and facts["met"]):
        problems.append(f"after ranks had met: {text}")
    problems += _of_kinds(found, profile)
    problems += _of_versions(found, config)
    for facts in found:
        where = f"rank {facts['rank']} on {facts['host']}"
        if facts["met"] and facts["sees"] < facts["size"] and not facts["problem"]:
            problems.append(f"{where} sees {facts['sees']} of the {facts['size']} files that ranks have written: the job's "
                            "folder is not on a file system that all nodes share, or is late")
        if abs(facts["skew_s"]) > SLOW_SKEW_S:
            problems.append(f"{where}: its clock is {facts['skew_s']:+.1f} s off rank 0's; let the site set it (chrony, NTP)")
        if facts["data"]:
            problems.append(f"{where}: {facts['data']}")
        if facts["wandb_online"] is False:
            problems.append(f"{where} does not reach api.wandb.ai, but the run would be online; set WANDB_MODE=offline among "
                            "the kind's variables, and wandb sync from the login node")
    return list(dict.fromkeys(problems)), _remarks(found)


def _of_kinds(found: Sequence[Mapping[str, Any]], profile: Profile) -> list[str]:
    """Accelerators that were asked for and are not seen."""
    problems = []
    for kind in profile.kinds:
        ranks = [facts for facts in found if facts["kind"] == kind.name]
        if not ranks or not (kind.gres or "").startswith("gpu"):
            continue
        blind = [facts for facts in ranks if not facts["devices"]]
        few = [facts for facts in ranks if 0 < len(facts["devices"]) < kind.tasks_per_node]
        if blind:
            problems.append(f"kind {kind.name} asks for {kind.gres}, but torch {blind[0]['versions']['torch']} of rank "
                            f"{_ranks(f['rank'] for f in blind)} sees no accelerator on {blind[0]['host']}: a build for CPUs, "
                            "or no driver there; it would train on the CPU")
        if few:
            problems.append(f"kind {kind.name} has {kind.tasks_per_node} ranks a node, but {few[0]['host']} shows "
                            f"{len(few[0]['devices'])} devices: ranks would share them; set gres or tasks_per_node otherwise")
    return problems


def _of_versions(found: Sequence[Mapping[str, Any]], config: Config) -> list[str]:
    problems = []
    own = Counter(facts["versions"]["moedist"] for facts in found)
    if len(own) > 1:
        problems.append(f"ranks have different versions of moedist: {', '.join(sorted(own))}; install the same everywhere")
    series = {".".join(facts["versions"]["torch"].split(".")[:2]) for facts in found}
    if len(series) > 1:
        problems.append(f"ranks have different versions of torch ({', '.join(sorted(series))}): checkpoints and random "
                        "numbers may differ; install one version, in each vendor's build")
    needed = {"deepspeed": config.engine.name == "deepspeed", "mpi4py": config.world.transport == "mpi"}
    for name in (name for name, asked in needed.items() if asked):
        if without := [facts for facts in found if name not in facts["versions"]]:
            problems.append(f"{name} is asked for and missing on {', '.join(sorted({f['host'] for f in without}))} (kind "
                            f"{without[0]['kind']}); pip install 'moedist[{'mpi' if name == 'mpi4py' else name}]' there")
    return problems


def _remarks(found: Sequence[Mapping[str, Any]]) -> list[str]:
    met = [facts for facts in found if facts["sends_bytes_per_s"]]
    remarks = []
    if met:
        fastest = max(facts["sends_bytes_per_s"] for facts in met)
        for facts in met:
            if facts["sends_bytes_per_s"] < SLOW_LINK * fastest:
                remarks.append(f"rank {facts['rank']} on {facts['host']} sends {facts['sends_bytes_per_s'] / 1e9:.2g} GB/s, "
                               f"the fastest {fastest / 1e9:.2g} GB/s")
    if len({facts["versions"]["python"] for facts in found}) > 1:
        remarks.append("ranks have different versions of Python, which is fine")
    return remarks


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for facts in found:
        versions = dict(facts["versions"])
        device = Counter(facts["devices"]).most_common(1)
        rows.append([str(facts["rank"]), facts["kind"], facts["host"], versions.pop("python"), versions.pop("torch"),
                     ", ".join(f"{name} {v}" for name, v in versions.items() if name != "moedist"), facts["mpi"] or "-",
                     f"{device[0][1]} {device[0][0]}" if device else f"{facts['cores']} cores",
                     f"{facts['sends_bytes_per_s'] / 1e9:.3g} GB/s" if facts["met"] else "not met",
                     f"{1e3 * facts['skew_s']:+.0f} ms"])
    return table(["rank", "kind", "host", "python", "torch", "with", "MPI", "devices", "sends", "clock"], rows)


def _ranks(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
