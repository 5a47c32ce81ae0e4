"""Affinity of layers that decide alike, of layers that know nothing of each other, and by hand."""

import math

import pytest
import torch

from moedist.traces.affinity import affinity, conditional, entropy_bits, joint_mass


def one_hot(ids, experts):
    return torch.nn.functional.one_hot(ids, experts).bool()


def test_a_layer_that_follows_the_one_before():
    ids = torch.arange(8).repeat(5).view(2, 20)
    joint = joint_mass(one_hot(ids, 8), one_hot((3 * ids) % 8, 8))
    found = affinity(joint)
    assert found["mutual_information"] == pytest.approx(3) and found["normalised"] == pytest.approx(1)
    assert found["top"] == 1 and found["chance"] == pytest.approx(1 / 8) and found["tokens"] == 40
    assert conditional(joint)[1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_layers_that_know_nothing_of_each_other():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 6, (10, 400), generator=generator) for _ in range(2))
    found = affinity(joint_mass(one_hot(a, 6), one_hot(b, 6)))
    assert found["bias"] == pytest.approx(25 / (2 * 4000 * math.log(2)))
    assert found["bias"] / 3 < found["mutual_information"] < 3 * found["bias"]
    assert found["top"] < found["chance"] + 0.03


def test_tokens_with_several_experts_by_hand():
    """One token with experts 0 and 1, then 0; one with 1, then 0 and 1; one that no expert of the second layer takes."""
    this = torch.tensor([[[1, 1, 0], [0, 1, 0], [1, 0, 0]]]).bool()
    following = torch.tensor([[[1, 0], [1, 1], [0, 0]]]).bool()
    joint = joint_mass(this, following)
    assert joint.tolist() == [[0.5, 0], [1, 0.5], [0, 0]]
    assert conditional(joint).tolist() == [[1, 0], [pytest.approx(2 / 3), pytest.approx(1 / 3)], [0, 0]]
    found = affinity(joint)
    p = [0.25, 0.5, 0.25]  # of the three cells
    expected = sum(x * math.log2(x / (y * z)) for x, y, z in zip(p, (0.25, 0.75, 0.75), (0.75, 0.75, 0.25)))
    assert found["mutual_information"] == pytest.approx(expected)
    assert found["top"] == pytest.approx(0.75) and found["chance"] == pytest.approx(0.75) and found["tokens"] == 2


def test_nothing():
    found = affinity(torch.zeros(3, 3).double())
    assert set(found.values()) == {0} and not conditional(torch.zeros(2, 2)).any()
    assert entropy_bits(torch.tensor([2, 2, 0, 4])) == pytest.approx(1.5)
