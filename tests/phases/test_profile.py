"""What `--profile` takes and shows; the traces themselves are looked at in tests/monitor/test_wandb_run.py."""

import pytest
import torch

from moedist.config import profile_steps
from moedist.errors import ConfigError
from moedist.phases.profile import profile_table
from moedist.timing import REGIONS, name_regions, region
from tests.launching import moedist


def test_steps():
    assert list(profile_steps("10-12")) == [10, 11, 12] and list(profile_steps("7")) == [7] and not profile_steps(None)
    assert list(profile_steps(7)) == [7]  # as YAML reads it
    for wrong in ("0-3", "5-3", "a-b", "3-", "-3", "steps=3"):
        with pytest.raises(ConfigError, match="such as 10-15"):
            profile_steps(wrong)


def test_the_command_checks_them_first(cache):
    done = moedist(1, cache, "train", "configs/quickstart.yaml", "--profile", "steps=9-3", "--check", ok=False)
    assert "monitor.profile is '9-3'" in done.stderr
    moedist(1, cache, "train", "configs/quickstart.yaml", "--profile", "steps=3-9", "--check")


def test_table():
    lines = profile_table([dict.fromkeys(REGIONS, 1.5), dict.fromkeys(REGIONS, 20.25)]).splitlines()
    assert lines[0].split() == ["region", "rank", "0", "rank", "1"] and lines[1].split() == ["route", "1.50", "20.25"]
    assert len(lines) == 1 + len(REGIONS)


def test_regions_have_names_only_while_profiled():
    for named in (False, True):
        name_regions(named)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, region("route"):
            torch.ones(3).sum()
        assert ("route" in {event.key for event in profiler.key_averages()}) == named
    name_regions(False)
