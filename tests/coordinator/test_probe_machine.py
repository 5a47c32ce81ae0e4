"""Memory of a rank: the machine's, or what a control group leaves of it."""

import os
from pathlib import Path

import pytest
import torch

from moedist.coordinator.probe_machine import Memory, device_memory, device_name, host_memory, host_name, processor_name

GIB = 2**30


@pytest.fixture
def system(tmp_path):
    """Made-up /proc and /sys/fs/cgroup: a machine of 64 GiB, 48 of them free, in the control groups given."""
    def make(cgroup: str | None, groups: dict[str, dict[str, str]]) -> tuple[Path, Path]:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(f"MemTotal:  {64 * 2**20} kB\nMemFree:  1024 kB\nMemAvailable:   {48 * 2**20} kB\n"
                                      "HugePages_Total:       0\n")
        if cgroup is not None:
            (proc / "self" / "cgroup").write_text(cgroup)
        for folder, files in groups.items():
            (cgroups / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (cgroups / folder / name).write_text(text)
        return proc, cgroups
    return make


def v1(limit_gib: float, used_gib: float, cache_gib: float = 0) -> dict[str, str]:
    return {"memory.limit_in_bytes": f"{int(limit_gib * GIB)}\n", "memory.usage_in_bytes": f"{int(used_gib * GIB)}\n",
            "memory.stat": f"cache 77\nrss 5\ntotal_inactive_file {int(cache_gib * GIB)}\n"}


def v2(limit_gib: float | None, used_gib: float, cache_gib: float = 0) -> dict[str, str]:
    limit = "max" if limit_gib is None else str(int(limit_gib * GIB))
    return {"memory.max": f"{limit}\n", "memory.current": f"{int(used_gib * GIB)}\n",
            "memory.stat": f"anon 5\ninactive_file {int(cache_gib * GIB)}\n"}


def gib(memory: Memory) -> tuple[float, float]:
    return memory.free / GIB, memory.total / GIB


def test_without_control_groups_it_is_the_machine(system):
    assert gib(host_memory(*system(None, {}))) == (48, 64)


def test_version_1_limits_and_cached_files_give_way(system):
    found = system("9:cpu,cpuacct:/job\n8:memory:/slurm/job_7\n1:name=systemd:/\n",
                   {"memory/slurm/job_7": v1(16, 10, 3), "memory/slurm": v1(2**30, 20)})
    assert gib(host_memory(*found)) == (9, 16)


def test_version_2_limits(system):
    found = system("0::/system.slice/job\n", {"system.slice/job": v2(8, 6, 1), "system.slice": v2(None, 30)})
    assert gib(host_memory(*found)) == (3, 8)


def test_the_tightest_group_above_counts(system):
    found = system("0::/a/b/c\n", {"a": v2(4, 3.5), "a/b": v2(32, 1), "a/b/c": v2(None, 1)})
    assert gib(host_memory(*found)) == (0.5, 4)


def test_a_full_group_leaves_nothing(system):
    assert gib(host_memory(*system("0::/full\n", {"full": v2(2, 2.5)}))) == (0, 2)


def test_a_group_larger_than_the_machine_is_no_limit(system):
    assert gib(host_memory(*system("4:memory:/x\n", {"memory/x": v1(2**33, 1)}))) == (48, 64)


@pytest.mark.parametrize("entry", ["4:memory:/gone\n", "0::/gone\n", "3:cpu:/x\n"])
def test_a_group_that_cannot_be_read_is_no_limit(system, entry):
    assert gib(host_memory(*system(entry, {}))) == (48, 64)


def test_not_linux(tmp_path):
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    found = host_memory(tmp_path / "none", tmp_path / "none")
    assert found.total == page * pages and 0 < found.free <= found.total


def test_this_machine():
    memory = device_memory(torch.device("cpu"))
    assert 0 < memory.free <= memory.total
    assert host_name() and processor_name() == device_name(torch.device("cpu")) != ""


@pytest.mark.gpu
def test_an_accelerator():
    device = torch.device(torch.accelerator.current_accelerator().type, 0)
    memory = device_memory(device)
    assert 0 < memory.free <= memory.total and device_name(device) not in ("", "cpu")
