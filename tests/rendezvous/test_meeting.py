"""Ranks of one life of a job meet over a store in which former lives have written."""

import threading

import pytest
import torch.distributed as dist

from moedist.rendezvous.meeting import _come, _host


def meet_over(store, size: int) -> list[str]:
    """What each rank calls the life."""
    names = [""] * size
    others = [threading.Thread(target=lambda r=r: names.__setitem__(r, _come(store, r))) for r in range(1, size)]
    for thread in others:
        thread.start()
    names[0] = _host(store, size, 20)
    for thread in others:
        thread.join(20)
    return names


def test_every_life_has_its_own_name():
    store = dist.HashStore()
    names = [meet_over(store, size) for size in (3, 3, 2, 4)]
    assert all(len(set(life)) == 1 and life[0] for life in names)
    assert len({life[0] for life in names}) == len(names)


def test_a_former_life_is_not_taken_for_this_one():
    """Rank 1 of a former life came; rank 1 of this life does not, or comes late."""
    store = dist.HashStore()
    meet_over(store, 2)
    with pytest.raises(RuntimeError, match="rank 1 has not come"):
        _host(store, 2, 0.3)
    names = []
    late = threading.Timer(0.3, lambda: names.append(_come(store, 1)))
    late.start()
    names.append(_host(store, 2, 20))
    late.join(20)
    assert names[0] == names[1]
