"""Whether islands meet in every layer or once a step: by the rule, by memory, and by what the user says."""

import dataclasses

import pytest

from moedist.config import PlacementConfig, config_from_dict
from moedist.coordinator.meeting_points import crossing_rows, experts_in_every_island
from moedist.coordinator.sizes import Sizes
from moedist.coordinator.start import written_plan
from moedist.errors import PlacementError
from tests.coordinator.ranks_of import facts_of

TREE = {"data": {"sequence_length": 16}, "train": {"batch": 16, "accumulate": 2}, "placement": {"planner": "equal"},
        "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_hidden": 64}}
SIZES = Sizes.of(config_from_dict(TREE), 300)
FACTS = facts_of([300, 100, 100], islands=[0, 1, 1])
ROOM = [8, 4, 4]


def choose(wanted, slots=ROOM, sizes=SIZES, facts=FACTS):
    return experts_in_every_island(PlacementConfig(experts_in_every_island=wanted), facts, slots, sizes, "auto")


def test_rows_that_cross():
    """256 tokens; 0.6 of them in island 0, where 0.6 of the experts are. A row for every expert, or one for both."""
    a, b = 154, 102  # 256 cut 3 : 2
    assert crossing_rows(FACTS, SIZES, "none") == pytest.approx((a * 2 * 0.4 + b * 2 * 0.6) / 8)
    assert crossing_rows(FACTS, SIZES, "island") == pytest.approx((a * (1 - 0.6**2) + b * (1 - 0.4**2)) / 8)
    three = facts_of([100, 100, 100], islands=[0, 1, 2])
    assert crossing_rows(three, SIZES, "none") == pytest.approx(256 * 2 * (2 / 3) / 8 / 2), "two copies are needed of each"


def test_the_rule():
    """23 rows of an expert cross; a copy is less from 0.75 times the hidden width."""
    no, why = choose("auto")
    assert not no and why.startswith("23 rows of an expert would cross between islands in a step; above 48, 0.75 of its hidden")
    narrow = Sizes.of(config_from_dict(TREE, ["model.expert_hidden=24"]), 300)
    yes, why = choose("auto", sizes=narrow)
    assert yes and "above 18, 0.75 of its hidden width, a copy in every island is less" in why
    no, why = choose("auto", [8, 4, 3], narrow)
    assert not no and "island 1 (ranks [1, 2]) can hold 7 of the 8 experts" in why
    idle = [*FACTS[:2], dataclasses.replace(FACTS[2], expert_rows_per_s=0.0)]
    no, why = choose("auto", sizes=narrow, facts=idle)
    assert not no and "can hold 4 of the 8 experts" in why, "a rank without speed gets no experts"


def test_what_the_user_says():
    assert choose(True) == (True, "placement.experts_in_every_island=true") and not choose(False)[0]
    with pytest.raises(PlacementError, match=r"=true, but island 1 \(ranks \[1, 2\]\) can hold 7 of the 8 experts"):
        choose(True, [8, 4, 3])
    assert choose(True, facts=facts_of([1, 1], islands=[0, 0]), slots=[8, 8]) == (False, "")


def test_a_placement_that_is_written_down():
    everywhere = ["placement.experts_in_every_island=true", "world.islands=[nvidia,amd,amd]"]
    plan, _ = written_plan(config_from_dict(TREE, [*everywhere, "placement.batch_shares=[2,1,1]"]), 3, None)
    layer = plan.layer(1)
    assert [layer.experts_of_rank(r) for r in range(3)] == [list(range(8)), [0, 1, 2, 3], [4, 5, 6, 7]]
    assert layer.islands == (0, 1, 1) and layer.shares[0] == (0.5, 0.5)
    one, _ = written_plan(config_from_dict(TREE, [everywhere[0], "world.islands=[a,a]"]), 2, None)
    assert one.layer(0).islands == () and one.layer(0).experts_of_rank(0) == [0, 1, 2, 3], "one island: as ever"
    plan, _ = written_plan(config_from_dict(TREE, [*everywhere, "placement.counts=[8,6,2]"]), 3, None)
    assert len(plan.layer(0).experts_of_rank(1)) == 6
    with pytest.raises(PlacementError, match=r"island 'amd' \(ranks \[1, 2\], here counted from 0\): .*sums to 7"):
        written_plan(config_from_dict(TREE, [*everywhere, "placement.counts=[8,6,1]"]), 3, None)
    with pytest.raises(PlacementError, match="set world.islands to 3 names"):
        written_plan(config_from_dict(TREE, everywhere[:1]), 3, None)
