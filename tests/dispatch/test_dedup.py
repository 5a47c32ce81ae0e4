"""Rows that are shared, sent on by gateways, rounded or overlapped: the same results, with as few rows as the routing asks."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moedist.dispatch import Sharing
from moedist.routing import RouterInput
from moedist.timing import Meter
from tests.dispatch.counting import Counting
from tests.dispatch.test_equivalence import cases, check_equals_one_process, run_case_on
from tests.moe_cases import Case, build_layer, run_case
from tests.ranks import run_ranks

SEVERAL = [(0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 1, 2)]
SINGLE = (0, 1, 1, 3, 3, 0, 2, 1, 3)
COPIES = ((0, 1), 1, (0, 2, 3), 3, 3, 0, 2, 1, (1, 3))
MODES = [Sharing(overlap=False), Sharing(overlap=True), Sharing(overlap=True, pieces=3)]


def shared(sharing: Sharing, dedup: str, wire=(None, None)) -> Sharing:
    return Sharing(dedup, wire, sharing.overlap, sharing.pieces)


@pytest.mark.parametrize("dedup", ["none", "rank", "island"])
@pytest.mark.parametrize("islands", [(), *SEVERAL], ids=str)
def test_equals_one_process(islands, dedup):
    """One rank has no sequences; with one expert a token, two, and eight of nine."""
    for i, mode in enumerate(MODES):
        for j, top_k in enumerate((1, 2, 8)):
            owners = (SINGLE, COPIES)[(i + j) % 2]
            check_equals_one_process(Case(owners, (2, 0, 3, 1), top_k=top_k, sequence=4, islands=islands,
                                          sharing=shared(mode, dedup)))


@pytest.mark.parametrize("dedup", ["none", "rank", "island"])
@pytest.mark.parametrize("islands", SEVERAL, ids=str)
def test_equals_one_process_with_mpi_between_islands(islands, dedup):
    for mode, top_k, owners in zip(MODES, (1, 2, 8), (COPIES, SINGLE, COPIES)):
        check_equals_one_process(Case(owners, (2, 0, 3, 1), top_k=top_k, sequence=4, islands=islands,
                                      sharing=shared(mode, dedup)), "mpi")


@st.composite
def ways(draw) -> Case:
    """Any router, owner map and islands, on two to four ranks."""
    case = draw(cases(draw(st.sampled_from(["topk", "expert_choice", "soft_moe", "hash", "switch", "shared_expert"]))))
    ranks = len(case.sequences)
    islands = {1: [()], 2: [(0, 1), ()], 3: [(0, 0, 1), (0, 1, 0), ()], 4: [*SEVERAL, (0, 1, 0, 1), ()]}[ranks]
    sharing = Sharing(draw(st.sampled_from(["none", "rank", "island"])), (None, None), draw(st.booleans()),
                      draw(st.sampled_from([1, 1, 2])))
    return Case(**{**case.__dict__, "islands": draw(st.sampled_from(islands)), "sharing": sharing})


@pytest.mark.parametrize("transport, examples", [("torchdist", 30), ("mpi", 10)])
def test_any_router_and_placement_equals_one_process(transport, examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(ways())
    def check(case):
        check_equals_one_process(case, transport)

    check()


def test_no_tokens_anywhere():
    for dedup in ("none", "rank", "island"):
        case = Case((0, 1, 2, 3), (0, 0, 0, 0), islands=(0, 0, 1, 1), sharing=Sharing(dedup, (torch.int8, None), True, 2))
        for part in run_ranks(4, run_case, case):
            assert part.y.shape == (0, 6, 8) and all(not g.any() for g in part.expert_grads.values())


def watched_calls(world, case):
    """What a layer calls, forward and backward, in order."""
    layer, _ = build_layer(world, case)
    dispatcher, calls = layer.dispatcher, []
    if case.islands:
        transport = dispatcher.transport
        transport.native, transport.outer = (Counting(getattr(transport, name), name, calls) for name in ("native", "outer"))
    else:
        dispatcher.transport = Counting(dispatcher.transport, "rows", calls)
    bank = layer.bank.forward
    layer.bank.forward = lambda *args: (calls.append("experts"), bank(*args))[1]
    x = torch.randn(case.sequences[world.rank], 6, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    y, _ = layer(RouterInput(x, ids, ids, 0, True))
    forward = list(calls)
    y.sum().backward()
    return forward, calls[len(forward):]


def started(calls):
    return [call for call in calls if call in ("counts", "rows", "native", "outer")]


@pytest.mark.parametrize("sequences", [(2, 1, 1, 0), (0, 0, 0, 0)])
def test_collectives_of_a_layer(sequences):
    """One count exchange, two data exchanges each way; with gateways each is native, outer and native again."""
    case = Case((0, 1, 2, 3), sequences)

    def calls_of(islands, sharing):
        return run_ranks(4, watched_calls, Case(**{**case.__dict__, "islands": islands, "sharing": sharing}))

    for forward, backward in calls_of((), Sharing("rank")):
        assert started(forward) == ["counts", "rows", "rows"] and started(backward) == ["rows", "rows"]
    for forward, backward in calls_of((0, 0, 1, 1), Sharing("rank")):
        assert started(forward) == ["counts", "outer", "native", "native", "outer"]
        assert sorted(started(backward)) == ["native", "native", "outer", "outer"]
    for forward, backward in calls_of((0, 0, 1, 1), Sharing("island", overlap=True)):
        assert started(forward) == ["counts", "outer", "native", "native", "native", "native", "outer"]
        assert started(backward) == ["outer", "native", "native", "native", "native", "outer"]
    for forward, backward in calls_of((), Sharing("rank", overlap=True, pieces=3)):
        assert started(forward) == ["counts"] + 6 * ["rows"] and started(backward) == 6 * ["rows"]


def test_own_rows_are_computed_while_others_travel():
    case = Case((0, 1), (1, 1), sharing=Sharing("rank", overlap=True))
    for forward, backward in run_ranks(2, watched_calls, case):
        assert forward == ["counts", "rows", "experts", "rows done", "experts", "rows", "rows done"]
        assert backward == ["rows", "rows done", "rows", "rows done"]
    case = Case((0, 1), (2, 2), sharing=Sharing("rank", overlap=True, pieces=2))
    for forward, _ in run_ranks(2, watched_calls, case):
        # the second piece is on its way before the first is computed; results travel while the second is computed
        assert forward == ["counts", "rows", "rows", "experts", "rows done", "experts", "rows", "experts", "rows done",
                           "experts", "rows", "rows done", "rows done"]


def gradients_meet_experts(world):
    """Order of a backward pass: exchanges begun and ended, and experts' gradients."""
    case = Case((0, 1), (1, 1), sharing=Sharing("rank", overlap=True))
    layer, _ = build_layer(world, case)
    calls: list[str] = []
    layer.dispatcher.transport = Counting(layer.dispatcher.transport, "rows", calls)
    run = layer.dispatcher.run

    def noting(*args):
        *args, experts = args

        def noted(rows, counts):
            y = experts(rows, counts)
            y.register_hook(lambda grad: calls.append("experts"))
            return y

        return run(*args, noted)

    layer.dispatcher.run = noting
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    y, _ = layer(RouterInput(x, ids, ids, 0, True))
    forward = len(calls)
    y.sum().backward()
    return calls[forward:]


def test_gradients_of_own_rows_are_computed_while_others_travel():
    for calls in run_ranks(2, gradients_meet_experts):
        assert calls == ["rows", "rows done", "experts", "rows", "experts", "rows done"]


def traffic_and_routing(world, case):
    """What was sent, by link, and (token, expert) of every pair."""
    world.meter = Meter()
    layer, _ = build_layer(world, case)
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(case.sequences[world.rank], 6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    inputs = RouterInput(x, ids, ids, 0, True)
    routed = layer.router(inputs)
    y, _ = layer(inputs)
    y.sum().backward()
    links = {link: (t.rows, t.pairs, t.bytes) for (_, link), t in world.meter.take().links.items()}
    return links, list(zip(routed.token_ids_N.tolist(), routed.expert_ids_N.tolist()))


@pytest.mark.parametrize("islands", [(), *SEVERAL], ids=str)
@pytest.mark.parametrize("dedup", ["none", "rank", "island"])
@pytest.mark.parametrize("top_k", [1, 8])
def test_sent_rows_and_bytes_are_those_of_the_routing(islands, dedup, top_k):
    """Counted by hand from who chose what: rows to ranks or islands, those that gateways send on, bytes there and back."""
    found = run_ranks(4, traffic_and_routing, Case(SINGLE, (2, 1, 3, 0), top_k=top_k, islands=islands, sharing=Sharing(dedup)))
    island = islands or (0,) * 4
    rows, pairs, carried = dict.fromkeys(("own", "other"), 0), dict.fromkeys(("own", "other"), 0), {"own": 0, "other": 0}
    for source, (_, routing) in enumerate(found):
        away = [(token, SINGLE[e]) for token, e in routing if SINGLE[e] != source]
        near = [(t, r) for t, r in away if island[r] == island[source]]
        far = [(t, r) for t, r in away if island[r] != island[source]]
        unique = set if dedup != "none" else list
        pairs["own"] += len(near)
        pairs["other"] += len(far)
        rows["own"] += len(unique(near))
        carried["own"] += len(near)
        carried["other"] += len(far)
        if dedup == "island":
            rows["other"] += len({(t, island[r]) for t, r in far})
            for i in set(island) - {island[source]}:
                outside = [r for r in range(4) if island[r] != i]
                members = [r for r in range(4) if island[r] == i]
                gateway = members[outside.index(source) % len(members)]
                on = [(t, r) for t, r in far if island[r] == i and r != gateway]
                rows["own"] += len(set(on))
                carried["own"] += len(on)
        else:
            rows["other"] += len(unique(far))
    for link in ("own", "other"):
        sent = [links.get(link, (0, 0, 0)) for links, _ in found]
        assert sum(s[0] for s in sent) == rows[link] and sum(s[1] for s in sent) == pairs[link]
        # a row of 8 float64 there, back, and both ways as gradient; where rows are shared, weights there and back, and once
        # where pairs go to
        of_pairs = 0 if not islands and dedup == "none" else (2 * 8 + 4) * carried[link]
        assert sum(s[2] for s in sent) == 4 * 64 * rows[link] + of_pairs


@functools.lru_cache(maxsize=None)
def exact():
    return run_ranks(4, run_case, Case(COPIES, (2, 0, 3, 1), top_k=4, islands=(0, 0, 1, 1)))


def relative_error(parts, of) -> float:
    pairs = [(of(a), of(b)) for a, b in zip(parts, exact())]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


@pytest.mark.parametrize("dedup", ["none", "rank", "island"])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.int8, 2e-2)], ids=str)
def test_rows_rounded_between_islands(dtype, bound, dedup):
    """Forward and backward apart: what is not rounded is exact, and what is stays within the bound."""
    case = Case(COPIES, (2, 0, 3, 1), top_k=4, islands=(0, 0, 1, 1))
    forward, backward = (run_ranks(4, run_case, Case(**{**case.__dict__, "sharing": Sharing(dedup, wire, True)}))
                         for wire in ((dtype, None), (None, dtype)))
    assert 1e-6 < relative_error(forward, lambda p: p.y) < bound
    assert relative_error(backward, lambda p: p.y) < 1e-12
    assert 1e-6 < relative_error(backward, lambda p: p.grad_x) < bound


def test_nothing_is_rounded_inside_an_island():
    case = Case(COPIES, (2, 0, 3, 1), top_k=4, sharing=Sharing("rank", (torch.int8, torch.int8)))
    assert relative_error(run_ranks(4, run_case, case), lambda p: p.grad_x) < 1e-12


def measured_error(world, case):
    world.meter = Meter()
    layer, _ = build_layer(world, case)
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(world.rank))
    ids = torch.zeros(x.shape[:2], dtype=torch.int64)
    layer(RouterInput(x, ids, ids, 0, True))
    other = world.meter.take().links[0, "other"]
    return float(other.square_error), float(other.square), other.wait_s, other.transfer_s


@pytest.mark.parametrize("dtype, low, high", [(torch.bfloat16, 1e-4, 2**-8), (torch.int8, 1e-3, 1e-2)], ids=str)
def test_the_error_of_rounding_is_measured(dtype, low, high):
    case = Case((0, 1), (2, 2), islands=(0, 1), sharing=Sharing("island", (dtype, None)))
    for square_error, square, wait_s, transfer_s in run_ranks(2, measured_error, case):
        assert low < (square_error / square) ** 0.5 < high
        assert 0 < wait_s <= transfer_s


@pytest.mark.gpu
def test_shared_rows_on_an_accelerator_and_on_the_cpu_equal_one_process():
    kind = torch.accelerator.current_accelerator().type
    case = Case((0, 1, 1, 0), (2, 1), islands=(0, 1), sharing=Sharing("island", (None, None), True, 2))
    alone = run_ranks(1, run_case, case.alone())[0]
    for devices in ((kind, "cpu"), (kind, kind)):
        parts = run_ranks(2, run_case_on, case, devices)
        torch.testing.assert_close(torch.cat([p.y for p in parts]), alone.y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.cat([p.grad_x for p in parts]), alone.grad_x, rtol=1e-10, atol=1e-10)
