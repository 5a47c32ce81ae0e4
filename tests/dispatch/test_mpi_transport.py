"""What is MPI's own: time-outs, what it refuses, its staging buffers."""

import torch

from moedist.dispatch import build_transport, mpi_transport
from moedist.dispatch.staging import LEAST_BYTES, Staging
from moedist.errors import WorldError
from moedist.faults import is_lost_rank
from tests.ranks import run_ranks


def wait_for_nothing(world):
    """A message that nobody sends."""
    transport, timeout_s = build_transport(world), world.timeout_s
    request = world.mpi.Irecv(bytearray(8), source=(world.rank + 1) % world.size, tag=77)
    world.timeout_s = 0.2
    try:
        transport._finish(request)
    except RuntimeError as error:
        return str(error), is_lost_rank(error)
    finally:
        world.timeout_s = timeout_s
        request.Cancel()
        request.Wait()


def test_a_wait_ends_and_is_taken_for_a_lost_rank():
    for text, lost in run_ranks(2, wait_for_nothing, transport="mpi"):
        assert text.startswith("Timed out waiting 0.2 s") and lost


def too_many_rows(world):
    mpi_transport.MOST_ROWS, most = 3, mpi_transport.MOST_ROWS
    try:
        rows = torch.zeros(4, 2)
        build_transport(world).exchange(rows, [0, 4], [0, 4], out=rows.clone())
    except WorldError as error:
        return str(error)
    finally:
        mpi_transport.MOST_ROWS = most


def test_more_rows_than_mpi_can_count_are_refused_with_the_numbers():
    for text in run_ranks(2, too_many_rows, transport="mpi"):
        assert "exchanges 4 and 4 rows at once and MPI can count 3" in text and "train.accumulate" in text


def waited_s(world):
    world.meter.begin(0)
    if world.rank == 0:
        import time
        time.sleep(0.3)
    build_transport(world).all_gather_counts(torch.zeros(1, dtype=torch.int64))
    return world.meter._waiting_s


def test_waiting_is_not_compute():
    slow, fast = run_ranks(2, waited_s, transport="mpi")
    assert fast > 0.2 and slow < fast


def test_buffers_grow_and_are_used_again():
    staging = Staging()
    a, b = staging.take(10), staging.take(LEAST_BYTES)
    assert len(a) == 10 and a.data_ptr() != b.data_ptr() and staging.buffers == [LEAST_BYTES] * 2
    staging.give(a)
    staging.give(b)
    large = staging.take(LEAST_BYTES + 1)
    assert len(large) == LEAST_BYTES + 1 and staging.buffers == [LEAST_BYTES, 2 * LEAST_BYTES]
    small = staging.take(0)
    assert len(small) == 0 and staging.buffers == [LEAST_BYTES, 2 * LEAST_BYTES]
    where = large.data_ptr()
    staging.give(small)
    staging.give(large)
    for nbytes in (LEAST_BYTES + 5, 2 * LEAST_BYTES):
        again = staging.take(nbytes)
        assert again.data_ptr() == where
        staging.give(again)


def test_a_buffer_that_is_being_copied_is_waited_for():
    class Copy:
        waited = 0

        def synchronize(self):
            self.waited += 1

    staging, copy = Staging(), Copy()
    part = staging.take(8)
    staging.give(part, copy)
    assert copy.waited == 0
    assert staging.take(8).data_ptr() == part.data_ptr() and copy.waited == 1
