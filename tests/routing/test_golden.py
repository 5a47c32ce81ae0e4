"""Every router learns, and its losses stay what they were recorded to be (`python -m tests.routing.record` records anew)."""

import pytest

from moedist.routing import ROUTERS
from tests.routing.tiny_training import last, losses, recorded

# float64, but initial weights are drawn in float32, whose last bit may differ between machines. What that makes of the losses
# was measured: 1e-7 at most, but 1e-5 of the trees of comet, whose splits are steep.
SAME = dict.fromkeys(ROUTERS, 1e-6) | {"comet": 1e-4}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The operations are small."""


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_losses_are_those_recorded_and_below_the_bound(name, tmp_path):
    golden = recorded(name)
    found = losses(name, tmp_path)
    assert found == pytest.approx(golden["losses"], abs=SAME[name])
    assert last(found) < golden["bound"] < golden["frozen"] < golden["losses"][0]


@pytest.mark.parametrize("name", ["loss_free", "comet", "progressive"])
def test_what_a_router_counts_is_in_checkpoints(name, tmp_path):
    """In the middle of its schedule."""
    assert losses(name, tmp_path, resume_after=7) == pytest.approx(recorded(name)["losses"], abs=SAME[name])


def test_a_model_with_frozen_routers_and_experts_does_not_get_there(tmp_path):
    golden = recorded("topk")
    assert last(losses("topk", tmp_path, frozen=True)) == pytest.approx(golden["frozen"], abs=SAME["topk"])
