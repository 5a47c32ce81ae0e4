"""Joint CUR and then low rank."""

import pytest
import torch

from moedist.compress import Budget, Calibration, Cur, CurHybrid, Interp, Interpolated, compress_experts, decide
from moedist.errors import CompressError
from tests.compress.cases import calibrated, make_expert, same, tokens_of, trained


def rounds(method, expert, calibration, budget):
    """What one expert keeps, and what was decided before each round."""
    seen = []

    def gains(decided):
        seen.append(decided.get(0, {}))
        return {0: method.gains(expert, calibration, seen[-1])}

    return decide(method, gains, budget, itemsize=8)[0], seen


@pytest.mark.parametrize("gated", [True, False])
def test_is_low_rank_of_the_narrowed_expert(gated):
    expert = make_expert(gated=gated)
    calibration = calibrated(expert)
    method, keep = CurHybrid(multiple=1), {"neurons": 15, "gate": 3, "up": 4, "down": 5}
    compressed = method.compress(expert, calibration, keep)
    narrow = Cur(1).compress(expert, calibration, keep)
    expected = Interp().compress(narrow.dense(), calibration.select(narrow.neurons), keep)
    assert torch.equal(compressed.neurons, narrow.neurons) and same(compressed.dense(), expected.dense())
    assert compressed.numbers == expected.numbers and compressed.bytes == expected.bytes + 4 * 15
    for part, matrix in compressed.parts.items():
        assert isinstance(matrix, Interpolated)
        moments = {name: torch.ones(24, 8, dtype=torch.float64) for name in ("gate_m", "up_m", "down_m")}
        mapped = compressed.map_moments(**moments)[part]
        assert {name: tensor.shape for name, tensor in mapped.items()} == {
            name: tensor.shape for name, tensor in matrix.tensors().items()}
    x, _ = tokens_of(expert)
    assert compressed.padded().hidden == 24 and torch.allclose(compressed.padded()(x), compressed.dense()(x))


def test_second_curves_are_those_of_the_narrowed_expert_with_its_names():
    expert = make_expert()
    calibration, method = calibrated(expert), CurHybrid(multiple=1)
    assert [curve.part for curve in method.gains(expert, calibration, {})] == ["neurons"]
    for neurons in (15, 24):
        curves = method.gains(expert, calibration, {"neurons": neurons})
        assert [curve.part for curve in curves] == ["gate", "up", "down"]
        for ranks in ((1, 1, 1), (3, 2, 8), (8, 8, 8)):
            keep = {"neurons": neurons, **dict(zip(("gate", "up", "down"), ranks))}
            compressed = method.compress(expert, calibration, keep)
            assert sum(curve.bytes(r, 8) for curve, r in zip(curves, ranks)) == compressed.bytes
    assert same(compressed.dense(), expert) and compressed.neurons is None


def test_joint_cur_takes_its_share():
    expert = make_expert(64, 16)
    calibration, full = calibrated(expert), 8 * expert.numbers
    for share in (0.25, 0.5, 0.9):
        method = CurHybrid(joint_share=share, multiple=1)
        keep, seen = rounds(method, expert, calibration, Budget(ratio=0.6))
        assert [sorted(decided) for decided in seen] == [[], ["neurons"]]
        after_joint = Cur(1).compress(expert, calibration, seen[1]).bytes
        assert 0 <= (1 - 0.6 * share) * full - after_joint < 3 * 16 * 8 + 4
        assert 0 <= 0.4 * full - method.compress(expert, calibration, keep).bytes < 3 * 80 * 8


def test_no_tokens_and_options():
    expert = make_expert()
    method = CurHybrid(multiple=1)
    compressed = compress_experts({0: expert}, {0: Calibration.zeros(24, 8, method.needs)}, method, Budget(ratio=0.5),
                                  itemsize=8)[0]
    assert compressed.bytes <= 4 * expert.numbers and all(m.isfinite().all() for m in compressed.dense().parts.values())
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(CompressError, match="for all or nothing use cur or interp"):
            CurHybrid(joint_share=share)
    with pytest.raises(CompressError, match="multiple is 0"):
        CurHybrid(multiple=0)
    assert method.needs == Cur().needs | Interp().needs


def test_better_than_low_rank_alone_on_a_trained_expert():
    expert, calibration, x = trained(128, 16)
    errors = {}
    for name, method in (("hybrid", CurHybrid(multiple=1)), ("interp", Interp())):
        small = compress_experts({0: expert}, {0: calibration}, method, Budget(ratio=0.6), itemsize=8)[0]
        errors[name] = float((small.dense()(x) - expert(x)).norm() / expert(x).norm())
    assert errors["hybrid"] < errors["interp"]
