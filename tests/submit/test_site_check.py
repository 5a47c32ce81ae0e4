"""The check of a site: on real nodes, and what is made of facts that no test can bring about."""

import os
import re
from pathlib import Path

import pytest

from moedist.config import Config, WorldConfig
from moedist.submit.job_folder import JobFolder
from moedist.submit.listing import show_jobs
from moedist.submit.profile import NodeKind, Profile
from moedist.submit.site_check import check_site, judge, read_facts

FINE = {"kind": "a", "host": "a1", "size": 2, "sees": 2, "met": True, "problem": None, "skew_s": 0.0, "data": None,
        "wandb_online": None, "devices": ["A100"], "sends_bytes_per_s": 1e9, "latency_s": 1e-5, "mpi": "", "cores": 4,
        "versions": {"python": "3.11.2", "torch": "2.13.0+cu126", "moedist": "0.1"}}
PROFILE = Profile(kinds=[NodeKind(name="a", gres="gpu:1", nodes=2)])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_check_on_real_nodes(slurm, capfd):
    """Two kinds whose GPUs are in name only, as with torch's build for CPUs: ranks meet, and the check says what is wrong.

    The interpreter of one is in a container only, that of the other where only a module leads.
    """
    container, module = container_of(slurm), module_of(slurm)
    profile = slurm.profile("checked", nvidia=f"nodes: 1, container: {container}, python: /opt/venv/bin/python, venv: null",
                            amd=f"nodes: 1, modules: [{module}], python: python-of-module, venv: null", signal_s=300)
    assert not check_site(slurm.request(profile))
    shown = capfd.readouterr().out
    problems = [line for line in shown.splitlines() if line.startswith("problem:")]
    assert len(problems) == 2, shown
    for kind, line in zip(("nvidia", "amd"), problems):
        assert f"kind {kind} asks for gpu:{kind}:1, but torch" in line and "sees no accelerator" in line
    assert shown.count(" GB/s ") == 2 and "not met" not in shown
    assert re.search(r" nvidia +nvidia[12] ", shown) and re.search(r" amd +amd[12] ", shown)
    folder, = (slurm.shared / "checked/jobs").iterdir()
    programs = [facts["executable"] for facts in read_facts(JobFolder(folder))]
    assert programs == ["/opt/venv/bin/python", f"{slurm.shared}/venv-amd/module/python-of-module"]
    assert JobFolder(folder).script.read_text().count("--time=2:00\n") == 2
    listed = show_jobs(slurm.shared / "checked")
    assert " CHECKED " in listed and "trained to" not in listed
    assert "was a check, no training; it found 2 problems:\n  kind nvidia asks for gpu:nvidia:1" in listed


def container_of(slurm):
    """A command that starts a program in a root file system of its own, as a container has: this one's, but for /opt."""
    root, script = slurm.shared / "root", slurm.shared / "container"
    root.mkdir()
    script.write_text(f"""#!/bin/bash
exec unshare --mount bash -c 'mount --rbind / "$0" && mount -t tmpfs tmpfs "$0/opt" &&
    ln -s {slurm.shared}/venv-nvidia "$0/opt/venv" && exec chroot "$0" "$@"' {root} "$@"
""")
    script.chmod(0o755)
    return script


def module_of(slurm):
    """An environment module that leads to an interpreter of another name."""
    if not any(Path(file).exists() for file in ("/etc/profile.d/modules.sh", "/etc/profile.d/lmod.sh")):
        reason = "no environment modules here (apt-get install environment-modules)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder, module = slurm.shared / "venv-amd/module", slurm.shared / "modules/moedist"
    for made in (folder, module.parent):
        made.mkdir()
    (folder / "python-of-module").symlink_to("../bin/python")
    module.write_text(f"#%Module1.0\nprepend-path PATH {folder}\n")
    return module


@pytest.mark.parametrize("change, message", [
    ({}, None),
    ({"skew_s": -7.5}, "rank 1 on b1: its clock is -7.5 s off rank 0's"),
    ({"sees": 1}, "rank 1 on b1 sees 1 of the 2 files"),
    ({"met": False, "problem": "rank 1 on b1 could not reach 10.0.0.4:29500"}, "rank 1 on b1 could not reach"),
    ({"versions": {**FINE["versions"], "torch": "2.6.0+rocm6.2"}}, "different versions of torch (2.13, 2.6)"),
    ({"versions": {**FINE["versions"], "moedist": "0.2"}}, "different versions of moedist: 0.1, 0.2"),
    ({"wandb_online": False}, "set WANDB_MODE=offline"),
    ({"data": "no text in /data"}, "rank 1 on b1: no text in /data"),
    ({"devices": []}, "kind a asks for gpu:1, but torch 2.13.0+cu126 of rank 1 sees no accelerator"),
])
def test_judge(change, message):
    found = [{**FINE, "rank": 0}, {**FINE, "rank": 1, "host": "b1", **change}]
    problems, _ = judge(found, PROFILE, Config(), 2)
    assert (problems == []) if message is None else any(message in problem for problem in problems), problems


def test_judge_of_what_is_missing():
    found = [{**FINE, "rank": 0}]
    problems, _ = judge(found, PROFILE, Config(world=WorldConfig(transport="mpi")), 2)
    assert any("rank 1 said nothing" in problem for problem in problems)
    assert any("mpi4py is asked for and missing on a1 (kind a)" in problem for problem in problems)


def test_slow_links_are_a_remark():
    found = [{**FINE, "rank": 0}, {**FINE, "rank": 1, "sends_bytes_per_s": 5e7}]
    problems, remarks = judge(found, PROFILE, Config(), 2)
    assert not problems and "rank 1 on a1 sends 0.05 GB/s, the fastest 1 GB/s" in remarks[0]
