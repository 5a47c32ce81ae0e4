"""Who stands in for dropped neurons, by hand and against the fit it explains; records on disk and over compressions."""

import dataclasses

import numpy as np
import pytest
import torch

from moedist.compress import CurHybrid, Cur, PruneMagnitude, PruneRandom, Svd, build_method
from moedist.compress.cur import fit_down, stand_ins
from moedist.errors import CheckpointError
from moedist.neurons.record import NeuronRecord, history, keeps_neurons, read_records, record_of, write_records
from tests.compress.cases import calibrated, make_expert, normal


def test_a_double_stands_in_alone_whatever_its_scale():
    h = normal(200, 6)
    h[:, 1], h[:, 4] = h[:, 3], -2 * h[:, 5]
    found = stand_ins(h.t() @ h, torch.tensor([0, 2, 3, 5]), ridge=1e-9)
    assert found.positions[:, 0].tolist() == [3, 5]
    assert found.weights[:, 0].tolist() == pytest.approx([1.0, -2.0], abs=1e-6)
    assert found.weights[:, 1:].abs().max() < 1e-6
    assert found.explained.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_a_sum_is_stood_in_for_by_its_parts_the_larger_one_first():
    h = normal(300, 4)
    h[:, 1] *= 10  # loud: half of it is more than three of the others
    h = torch.cat([h, (0.5 * h[:, 1] + 3 * h[:, 2]).unsqueeze(1)], 1)
    found = stand_ins(h.t() @ h, torch.arange(4), ridge=1e-9, most=2)
    assert found.positions.tolist() == [[1, 2]]
    assert found.weights[0].tolist() == pytest.approx([0.5, 3.0], abs=1e-6)


def test_nothing_stands_in_for_what_is_unlike_all_others():
    h = torch.eye(4, dtype=torch.float64)
    h[3] = 0  # neuron 3 never fires
    found = stand_ins(h.t() @ h, torch.tensor([0, 1]))
    assert found.weights.abs().max() == 0
    assert found.explained.tolist() == [0.0, 1.0]  # neuron 2 is lost, of neuron 3 nothing is


@pytest.mark.parametrize("block", [1, 5, 256])
def test_weights_are_those_that_the_down_projection_was_fitted_with(block):
    h, down, kept = normal(60, 14), normal(14, 3, seed=1), torch.tensor([0, 2, 3, 7, 11])
    moment = h.t() @ h
    found = stand_ins(moment, kept, ridge=0.01, most=5, block=block)
    dropped = [k for k in range(14) if k not in kept.tolist()]
    fitted = down.clone()
    for k, positions, weights in zip(dropped, found.positions, found.weights):
        fitted[positions] += weights.unsqueeze(1) * down[k]
    assert torch.allclose(fitted[kept], fit_down(down, moment, kept, 0.01), atol=1e-10)


def test_explained_is_one_minus_the_residual_over_tokens():
    h, kept = normal(40, 8), torch.tensor([1, 2, 4, 5, 6])
    found = stand_ins(h.t() @ h, kept, ridge=0.1, most=5)
    for k, positions, weights, explained in zip([0, 3, 7], *vars(found).values()):
        residual = h[:, k] - h[:, positions] @ weights
        assert explained == pytest.approx(1 - residual.square().sum() / h[:, k].square().sum())


def test_all_kept_and_few_kept():
    h = normal(20, 5)
    assert stand_ins(h.t() @ h, torch.arange(5)).positions.shape == (0, 3)
    assert stand_ins(h.t() @ h, torch.tensor([4])).positions.tolist() == [[4]] * 4


@pytest.mark.parametrize("method", [Cur(multiple=1), CurHybrid(multiple=1), PruneRandom(multiple=1),
                                    PruneMagnitude(multiple=1, least_squares=True)], ids=repr)
def test_records_name_neurons_as_before_the_first_compression(method):
    expert = make_expert(12, 8)
    calibration, names = calibrated(expert), torch.arange(12).int() * 10
    keep = {"neurons": 5, "gate": 3, "up": 3, "down": 3}
    new = method.compress(expert, calibration, keep)
    record = record_of(method, calibration, new, names)
    assert record.kept.tolist() == (new.neurons * 10).tolist() and len(record.kept) == 5
    assert sorted([*record.kept, *record.dropped]) == names.tolist()
    assert record.fisher == pytest.approx(calibration.fisher.numpy(), rel=1e-6)
    share = calibration.fisher[new.neurons.long()].sum() / calibration.fisher.sum()
    assert record.fisher_kept == pytest.approx(float(share), rel=1e-5)
    if isinstance(method, PruneRandom):
        assert record.stand_in is None  # its down rows stay: nobody does
    else:
        assert record.stand_in.shape == (7, 3) and set(record.stand_in.flat) <= set(record.kept)


def test_methods_that_keep_neurons():
    names = ["cur", "cur-hybrid", "prune-random", "prune-magnitude"]
    assert all(keeps_neurons(build_method(name)) for name in names)
    assert not keeps_neurons(Svd()) and not keeps_neurons(build_method("interp"))


def record(neurons, kept) -> NeuronRecord:
    ids = np.array(neurons, np.int32)
    return NeuronRecord(ids, np.ones(len(ids), np.float32), np.array(kept, np.int32), np.setdiff1d(ids, kept))


def test_files_hold_all_that_there_is(tmp_path):
    expert = make_expert(12, 8)
    calibration = calibrated(expert)
    full = record_of(Cur(multiple=1), calibration, Cur(multiple=1).compress(expert, calibration, {"neurons": 4}))
    records = {(3, 17): full, (0, 2): record([1, 2, 3], [2])}
    path = tmp_path / "compression-00000100.npz"
    write_records(path, records)
    assert "layers.3.experts.17.stand_in_weight" in np.load(path).files
    again = read_records(path)
    assert again.keys() == records.keys()
    for key, one in records.items():
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(again[key], field.name), getattr(one, field.name))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_records(path)


def test_history_goes_back_from_what_is_there_now():
    key, first, second = (0, 1), record([0, 1, 2, 3], [0, 1, 3]), record([0, 1, 3], [0, 3])
    other = record([0, 1, 3], [1])  # of another schedule, before the run was resumed
    assert history({10: {key: first}, 20: {key: second}}, key, np.array([0, 3])) == [(10, first), (20, second)]
    assert history({10: {key: first}, 20: {key: other}}, key, np.array([0, 1, 3])) == [(10, first)]
    assert history({10: {key: first}}, key, np.arange(4)) == []
    assert history({10: {(0, 2): first}}, key, np.array([0, 1, 3])) == []
