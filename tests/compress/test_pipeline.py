"""All methods from experts to smaller experts, in one process and in several."""

import threading

import pytest
import torch

from moedist.compress import (ALL_NEEDS, METHODS, MODES, Budget, Calibration, Expert, build_method, calibrate,
                              compress_experts, decide)
from moedist.compress.budget import full_bytes
from moedist.errors import CompressError
from tests.compress.cases import calibrated, make_expert, normal, same, tokens_of, trained

ITEMSIZE = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2}
VARIANTS = {
    **{name: (name, {"multiple": 2} if name in ("cur", "cur-hybrid") or name.startswith("prune") else {})
       for name in METHODS},
    **{f"cur-matrix {selection}": ("cur-matrix", {"selection": selection, "norm": "both"})
       for selection in ("top-leverage", "deim", "qr", "greedy")},
    "prune-random fitted": ("prune-random", {"multiple": 2, "least_squares": True}),
}
each = pytest.mark.parametrize("variant", VARIANTS)


def method_of(variant: str):
    name, options = VARIANTS[variant]
    return build_method(name, **options)


def experts_of(dtype: torch.dtype = torch.float64, gated: bool = True) -> tuple[dict, dict]:
    """Experts of two layers and three widths, one of them without tokens."""
    experts, calibrations = {}, {}
    for i, hidden in enumerate((16, 24, 40, 24)):
        key = (i // 2, i)
        experts[key] = make_expert(hidden, 12, gated, seed=i, dtype=dtype)
        calibrations[key] = calibrated(experts[key], 0 if i == 1 else 100 * i + 50, seed=i)
    return experts, calibrations


def bytes_of(things) -> int:
    return sum(thing.bytes for thing in things.values())


@each
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_within_the_budget_finite_and_consistent(variant, dtype, gated):
    method, (experts, calibrations) = method_of(variant), experts_of(dtype, gated)
    itemsize = ITEMSIZE[dtype]
    full = itemsize * sum(expert.numbers for expert in experts.values())
    for ratio, mode in ((0.3, "global"), (0.5, "uniform"), (0.5, "frequency"), (0.6, "global")):
        small = compress_experts(experts, calibrations, method, Budget(ratio=ratio), mode, itemsize=itemsize,
                                 frequency={key: float(c.rows) for key, c in calibrations.items()})
        assert small.keys() == experts.keys()
        assert 0.6 * (1 - ratio) * full < bytes_of(small) <= (1 - ratio) * full
        for key, expert in experts.items():
            dense, padded, (x, _) = small[key].dense(), small[key].padded(), tokens_of(expert)
            assert padded.up.shape == expert.up.shape and small[key].hidden == expert.hidden
            assert {m.dtype for m in dense.parts.values()} == {dtype}
            assert dense(x).isfinite().all()
            assert torch.allclose(dense(x).double(), padded(x).double(), rtol=0.05 if itemsize == 2 else 1e-4,
                                  atol=0.05 if itemsize == 2 else 1e-4)
            moments = {part: normal(*expert.up.shape).square() for part in expert.parts}
            for second in (False, True):
                mapped = small[key].map_moments(moments.get("gate"), moments["up"], moments["down"], second)
                for part, matrix in small[key].parts.items():
                    assert {n: t.shape for n, t in mapped[part].items()} == {n: t.shape for n, t in matrix.tensors().items()}
                    assert not second or all((t >= 0).all() for t in mapped[part].values())


@each
def test_ratio_zero_changes_nothing(variant):
    method, (experts, calibrations) = method_of(variant), experts_of(torch.float32)
    small = compress_experts(experts, calibrations, method, Budget(ratio=0.0))
    assert all(same(small[key].padded(), expert) and same(small[key].dense(), expert) for key, expert in experts.items())
    assert bytes_of(small) == 4 * sum(expert.numbers for expert in experts.values())


@each
def test_ratio_of_nearly_all(variant):
    """Either it fits, or the error says by how much it does not."""
    expert = make_expert(260, 230, dtype=torch.float32)
    calibrations = {0: calibrated(expert, 30, dtype=torch.float32)}
    small = compress_experts({0: expert}, calibrations, method_of(variant), Budget(ratio=0.99), floor=0.004)
    assert 0.5 * 0.01 * 4 * expert.numbers < small[0].bytes <= 0.01 * 4 * expert.numbers
    assert small[0].dense()(tokens_of(expert)[0]).isfinite().all()
    experts, calibrations = experts_of(torch.float32)
    with pytest.raises(CompressError, match=r"all experts may take \d+ bytes, but the least .* takes \d+: remove less"):
        compress_experts(experts, calibrations, method_of(variant), Budget(ratio=0.99))


@each
def test_deterministic(variant):
    experts, calibrations = experts_of()
    one, two = (compress_experts(experts, calibrations, method_of(variant), Budget(ratio=0.5), itemsize=8) for _ in "ab")
    for key in experts:
        assert same(one[key].padded(), two[key].padded()) and one[key].bytes == two[key].bytes


@each
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_decide_and_compute_as_one(variant, mode):
    experts, calibrations = experts_of()
    budget = Budget(ratio=0.5, owner_bytes={0: 9000}, owners={key: [key[1] % 2] for key in experts})
    options = {"mode": mode, "itemsize": 8, "frequency": {key: float(c.rows) for key, c in calibrations.items()}}
    alone = compress_experts(experts, calibrations, method_of(variant), budget, **options)
    owned = [[(0, 1), (0, 0)], [], [(1, 3), (1, 2)]]  # the second has no experts
    barrier, board, results = threading.Barrier(len(owned), timeout=60), {}, {}

    def gather(curves):
        board.update(curves)
        barrier.wait()
        merged = dict(board)
        barrier.wait()
        return merged

    def process(keys):
        results.update(compress_experts({key: experts[key] for key in keys}, calibrations, method_of(variant), budget,
                                        gather=gather, **options))

    threads = [threading.Thread(target=process, args=(keys,)) for keys in owned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.keys() == alone.keys()
    for key in experts:
        assert same(results[key].padded(), alone[key].padded()) and results[key].bytes == alone[key].bytes
    assert sum(alone[key].bytes for key in experts if key[1] % 2 == 0) <= 9000


@each
def test_again_on_what_was_compressed(variant):
    """Repeated phases: the dense form of a compressed expert, calibrated again, is an expert like any other."""
    method, (experts, calibrations) = method_of(variant), experts_of()
    for _ in range(2):
        small = compress_experts(experts, calibrations, method, Budget(ratio=0.3), itemsize=8)
        full = 8 * sum(expert.numbers for expert in experts.values())
        assert bytes_of(small) <= 0.7 * full
        experts = {key: compressed.dense() for key, compressed in small.items()}
        calibrations = {key: calibrated(expert, 100) for key, expert in experts.items()}


@each
def test_degenerate_experts(variant):
    zero, one = torch.zeros(16, 12, dtype=torch.float64), torch.outer(normal(16), normal(12, seed=1))
    usual = make_expert(16, 12)
    twins = Expert.of({part: matrix[:8].repeat(2, 1) for part, matrix in usual.parts.items()})
    dead = Expert(usual.gate * (torch.arange(16) % 2).unsqueeze(1), usual.up, usual.down)  # silu(0) = 0
    experts = {"zero": Expert(zero, zero, zero), "one": Expert(one, one, one), "twins": twins, "dead": dead,
               "untouched": usual}
    calibrations = {key: calibrated(expert, 0 if key == "untouched" else 90) for key, expert in experts.items()}
    for ratio in (0.0, 0.4):
        small = compress_experts(experts, calibrations, method_of(variant), Budget(ratio=ratio), itemsize=8)
        for key, compressed in small.items():
            assert all(t.isfinite().all() for m in compressed.parts.values() for t in m.tensors().values()), key
            assert not compressed.dense().up.any() or key != "zero"


def test_dead_neurons_go_first_and_cost_nothing():
    expert = make_expert(16, 12)
    expert.gate[8:12] = 0.0
    small = compress_experts({0: expert}, {0: calibrated(expert)}, build_method("cur", multiple=1), Budget(ratio=0.239),
                             itemsize=8)[0]
    assert small.neurons.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    x, _ = tokens_of(expert)
    assert torch.allclose(small.dense()(x), expert(x), atol=1e-12)


@each
def test_width_one(variant):
    experts = {0: make_expert(1, 1), 1: make_expert(6, 1), 2: make_expert(1, 6)}
    calibrations = {key: calibrated(expert) for key, expert in experts.items()}
    small = compress_experts(experts, calibrations, method_of(variant), Budget(ratio=0.0), itemsize=8)
    assert all(same(small[key].padded(), expert) for key, expert in experts.items())
    try:
        small = compress_experts(experts, calibrations, method_of(variant), Budget(ratio=0.25), itemsize=8)
    except CompressError as error:
        assert "bytes, but the least" in str(error)
    else:
        assert bytes_of(small) <= 0.75 * 8 * sum(expert.numbers for expert in experts.values())


@each
def test_what_is_not_finite_is_refused_with_words(variant):
    method = method_of(variant)
    expert, calibration = make_expert(), calibrated(make_expert())
    broken = Expert(expert.gate, expert.up.clone().index_fill_(0, torch.tensor(3), torch.nan), expert.down)
    calls = [lambda e, c: compress_experts({0: e}, {0: c}, method, Budget(ratio=0.5), itemsize=8),
             lambda e, c: method.compress(e, c, {"neurons": 8, "gate": 2, "up": 2, "down": 2})]
    for call in calls:
        with pytest.raises(CompressError, match="up holds 8 values of 192 that are not finite: compress from a checkpoint"):
            call(broken, calibration)
        for name in method.needs:
            spoilt = Calibration(**{**calibration.tensors(), name: calibration.tensors()[name] * torch.inf})
            with pytest.raises(CompressError, match=rf"{name} of an expert with 200 tokens holds \d+ values"):
                call(expert, spoilt)
            missing = Calibration(**{k: v for k, v in calibration.tensors().items() if k != name})
            with pytest.raises(CompressError, match=f"the method needs {name}"):
                call(expert, missing)


def test_quality_is_in_the_expected_order():
    """On the outputs of a trained expert, at the same bytes."""
    expert, calibration, x = trained(96, 24, n=800)
    errors = {}
    for label, name, options in (("cur", "cur", {}), ("bare", "cur", {"least_squares": False}),
                                 ("random", "prune-random", {"least_squares": True}), ("bare random", "prune-random", {}),
                                 ("hybrid", "cur-hybrid", {}), ("interp", "interp", {}), ("fisher", "svd-fisher", {}),
                                 ("literal", "cur-matrix", {})):
        method = build_method(name, **({"multiple": 1} if "multiple" in dir(METHODS[name]) else {}), **options)
        small = compress_experts({0: expert}, {0: calibration}, method, Budget(ratio=0.6), itemsize=8)[0]
        errors[label] = float((small.dense()(x) - expert(x)).norm() / expert(x).norm())
    assert errors["cur"] < errors["bare"] and errors["random"] < errors["bare random"]
    assert errors["cur"] < errors["random"] and errors["hybrid"] < errors["interp"] < errors["fisher"]
    assert errors["cur"] < errors["literal"] and errors["fisher"] < errors["literal"]


def test_one_budget_beats_the_same_share_for_all():
    """An expert that matters little gives way to one that matters."""
    (strong, calibration, x), weak = trained(64, 16), make_expert(64, 16, seed=5)
    experts = {0: strong, 1: weak}
    calibrations = {0: calibration, 1: calibrate(weak, x, 1e-9 * x, dtype=torch.float64)}
    widths = {mode: compress_experts(experts, calibrations, build_method("cur", multiple=1), Budget(ratio=0.5), mode,
                                     itemsize=8) for mode in ("global", "uniform")}
    assert widths["global"][0].dense().hidden > widths["uniform"][0].dense().hidden > widths["global"][1].dense().hidden


def test_stages_by_hand():
    experts, calibrations = experts_of()
    method = build_method("interp")

    def gains(decided):
        return {key: method.gains(expert, calibrations[key], decided.get(key, {})) for key, expert in experts.items()}

    assert full_bytes(gains({}), 8) == {key: 8 * expert.numbers for key, expert in experts.items()}
    keep = decide(method, gains, Budget(ratio=0.5), itemsize=8)
    whole = compress_experts(experts, calibrations, method, Budget(ratio=0.5), itemsize=8)
    for key, expert in experts.items():
        assert same(method.compress(expert, calibrations[key], keep[key]).dense(), whole[key].dense())


def test_methods_by_name():
    assert {type(build_method(name)) for name in METHODS} == set(METHODS.values())
    assert all(build_method(name).needs <= ALL_NEEDS and build_method(name).shares[-1] == 1 for name in METHODS)
    assert build_method("cur", ridge=1).ridge == 1
    for name, options, words in (("curr", {}, "did you mean 'cur'"), ("zzz", {}, "there are cur, cur-hybrid, interp"),
                                 ("cur", {"rigde": 1}, r"no option 'rigde'; it has multiple \(default 8\)"),
                                 ("cur", {"multiple": "8"}, "multiple of method cur is '8': it must be of type int"),
                                 ("cur", {"multiple": 0}, "multiple is 0")):
        with pytest.raises(CompressError, match=words):
            build_method(name, **options)


@pytest.mark.gpu
@each
def test_on_an_accelerator(variant):
    """The same neurons, and the same weights but for rounding; results stay where the weights are."""
    device = torch.accelerator.current_accelerator()
    experts, calibrations = experts_of()
    there = {key: Expert.of({p: m.to(device) for p, m in expert.parts.items()}) for key, expert in experts.items()}
    sums = {key: Calibration(**{n: t.to(device) for n, t in c.tensors().items()}) for key, c in calibrations.items()}
    method = method_of(variant)
    on_cpu = compress_experts(experts, calibrations, method, Budget(ratio=0.5), itemsize=8)
    for key, small in compress_experts(there, sums, method, Budget(ratio=0.5), itemsize=8).items():
        assert small.bytes == on_cpu[key].bytes
        assert {m.device.type for m in small.padded().parts.values()} == {device.type}
        for part, matrix in small.padded().parts.items():
            assert torch.allclose(matrix.cpu(), on_cpu[key].padded().parts[part], atol=1e-6)
