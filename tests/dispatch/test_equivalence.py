"""Any owner map, any router, any number of ranks gives the one-process result, forward and backward."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moedist.config.check import CHOICES, WITH_BIAS
from moedist.routing import ROUTERS
from tests.moe_cases import Case, run_case
from tests.ranks import run_ranks
from tests.routing.settings import fitting_options

TRANSPORTS = ("torchdist", "mpi")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
BIAS_IN = CHOICES["router.bias_in"]
FORMS = ("dense", "interp", "two", "cur", "interp dense two")


def check_equals_one_process(case: Case, transport: str = "torchdist") -> None:
    alone = run_ranks(1, run_case, case.alone())[0]
    parts = run_ranks(len(case.sequences), run_case, case, transport=transport)
    torch.testing.assert_close(torch.cat([p.y for p in parts]), alone.y, **EXACT)
    torch.testing.assert_close(torch.cat([p.grad_x for p in parts]), alone.grad_x, **EXACT)
    assert sum(p.loss for p in parts) == pytest.approx(alone.loss, rel=1e-10, abs=1e-10)
    for name, grad in alone.grads.items():
        torch.testing.assert_close(sum(p.grads[name] for p in parts), grad, **EXACT)
    expert_grads: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, grad in part.expert_grads.items():  # the gradient of an expert is the sum over its copies
            expert_grads[name] = expert_grads.get(name, 0) + grad
    assert expert_grads.keys() == alone.expert_grads.keys()
    for name, grad in alone.expert_grads.items():
        torch.testing.assert_close(expert_grads[name], grad, **EXACT)
    load_E = alone.load.sum(0)
    wanted_W = [sum(float(load_E[e]) * share for e, (ranks, shares) in enumerate(zip(case.plan().owners, case.plan().shares))
                    for rank, share in zip(ranks, shares) if rank == r) for r in range(len(parts))]
    for part in parts:
        assert torch.equal(part.load.sum(0), load_E)
        assert part.rows_W == parts[0].rows_W and sum(part.rows_W) == load_E.sum()
        for rows, wanted in zip(part.rows_W, wanted_W):
            assert abs(rows - wanted) <= len(case.owners), "every copy gets its share, to a row"


@st.composite
def cases(draw, router: str) -> Case:
    world = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 9))
    top_k = 1 if router == "switch" else draw(st.sampled_from([k for k in (1, 2, 8) if k <= experts]))
    one = st.integers(0, world - 1)
    some = st.sets(one, min_size=1).map(lambda ranks: tuple(sorted(ranks)))
    owners = draw(st.lists(draw(st.sampled_from([one, some])), min_size=experts, max_size=experts))
    sequences = draw(st.lists(st.integers(0, 3), min_size=world, max_size=world))
    widths = draw(st.one_of(st.just([]), st.lists(st.integers(1, 6), min_size=experts, max_size=experts)))
    kinds = draw(st.one_of(st.just([]), st.lists(st.sampled_from(FORMS), min_size=experts, max_size=experts)))
    parts = [draw(st.lists(st.integers(0, 4), min_size=len(o), max_size=len(o)).filter(any)) if isinstance(o, tuple) else [1]
             for o in owners]
    shares = tuple(tuple(p / sum(ps) for p in ps) for ps in parts)
    biases = st.lists(st.floats(-0.5, 0.5), min_size=experts, max_size=experts).map(tuple)
    bias = draw(st.one_of(st.just(()), biases)) if router in WITH_BIAS else ()
    return Case(tuple(owners), tuple(sequences), router, top_k, sequence=draw(st.integers(1, 7)), widths=tuple(widths),
                activation=draw(st.sampled_from(["swiglu", "gelu"])),
                options=tuple(fitting_options(router, experts, top_k).items()),
                capacity_factor=draw(st.sampled_from([None, 0.5, 1.0])), seed=draw(st.integers(0, 1000)),
                shared=3 if router in ("shared_expert", "deepseek_moe") else 0, training=draw(st.booleans()),
                shares=shares, kinds=tuple(kinds), bias=bias, bias_in=draw(st.sampled_from(BIAS_IN)) if bias else "choice")


# all that differs for a transport: whether tokens go to as many experts, to any number, to none, or are mixed
BY_MPI = ("topk", "expert_choice", "soft_moe", "null_experts")


@pytest.mark.parametrize("router, transport", [*((name, "torchdist") for name in sorted(ROUTERS)),
                                               *((name, "mpi") for name in BY_MPI)])
def test_any_placement_equals_one_process(router, transport):
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases(router))
    def check(case):
        check_equals_one_process(case, transport)

    check()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_uneven_ranks(world, top_k, transport):
    """Rank 0 owns nearly all experts and the last rank none; one rank has no sequences."""
    owners = (0,) * 6 + (1, 0, 1)[: 3] if world > 1 else (0,) * 9
    check_equals_one_process(Case(owners, (3, 0, 2, 1)[:world], top_k=top_k, sequence=5), transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_experts_in_every_form(activation, transport):
    """Rank 0 has a bank of dense experts, rank 1 one of several forms, rank 2 both kinds as copies, rank 3 none."""
    case = Case((0, 1, 1, (0, 2), (1, 2), 1), (1, 2, 0, 1), widths=(5, 6, 4, 3, 6, 5), activation=activation,
                kinds=("dense", "interp", "cur", "dense", "interp two dense", "dense"))
    check_equals_one_process(case, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kinds", [(), ("interp",) * 4])
def test_experts_without_tokens_get_zero_gradients(kinds, transport):
    """A large bias sends every token to experts 0 and 1: the others' gradients are zero, not missing."""
    case = Case((0, 1, 1, 0), (2, 1), top_k=2, bias=(9.0, 9.0, 0.0, 0.0), kinds=kinds)
    check_equals_one_process(case, transport)
    for part in run_ranks(2, run_case, case, transport=transport):
        for name, grad in part.expert_grads.items():
            assert bool(grad.any()) == ("experts.0." in name or "experts.1." in name), name


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_tokens_anywhere(transport):
    for part in run_ranks(2, run_case, Case((0, 1), (0, 0)), transport=transport):
        assert part.y.shape == (0, 6, 8) and part.loss == 0
        assert all(not g.any() for g in part.expert_grads.values())


def run_case_on(world, case, devices):
    return run_case(world, case, devices[world.rank])


@pytest.mark.gpu
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ranks_on_an_accelerator_and_on_the_cpu_equal_one_process(transport):
    kind = torch.accelerator.current_accelerator().type
    case = Case((0, 1, 1, 0), (2, 1))
    alone = run_ranks(1, run_case, case.alone())[0]
    for devices in ((kind, "cpu"), ("cpu", kind), (kind, kind)):
        parts = run_ranks(2, run_case_on, case, devices, transport=transport)
        torch.testing.assert_close(torch.cat([p.y for p in parts]), alone.y, **EXACT)
        torch.testing.assert_close(torch.cat([p.grad_x for p in parts]), alone.grad_x, **EXACT)
        for part in parts:
            for name, grad in part.expert_grads.items():
                torch.testing.assert_close(grad, alone.expert_grads[name], **EXACT)
