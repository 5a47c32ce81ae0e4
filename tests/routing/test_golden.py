"""Every router learns, and its losses stay what they were recorded to be (`python -m tests.routing.record` records anew)."""

import pytest

from moedist.routing import ROUTERS
from tests.routing.tiny_training import last, losses, recorded

SAME = 1e-6  # float64; initial weights are drawn in float32, whose last bit may differ between machines


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The operations are small."""


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_losses_are_those_recorded_and_below_the_bound(name, tmp_path):
    golden = recorded(name)
    found = losses(name, tmp_path)
    assert found == pytest.approx(golden["losses"], abs=SAME)
    assert last(found) < golden["bound"] < golden["frozen"] < golden["losses"][0]


def test_a_model_with_frozen_routers_and_experts_does_not_get_there(tmp_path):
    golden = recorded("topk")
    assert last(losses("topk", tmp_path, frozen=True)) == pytest.approx(golden["frozen"], abs=SAME)
