"""Overlaps known by hand, and chance against draws."""

import pytest
import torch

from moedist.neurons.overlap import choice_overlap, space_overlap
from tests.compress.cases import normal


def test_choices_by_hand():
    found = choice_overlap([[0, 1], [1, 2], [3, 4]], 6)
    assert found.matrix.tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    assert found.mean == pytest.approx(1 / 6) and found.most == (0, 1)
    assert found.chance == pytest.approx(1 / 3) and (found.size, found.of) == (2, 6)


@pytest.mark.parametrize("k, of", [(1, 2), (3, 10), (10, 10), (1, 1)])
def test_chance_of_choices_is_that_of_draws(k, of):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(of, generator=generator)[:k].tolist() for _ in range(300)]
    found = choice_overlap(drawn, of)
    pairs = found.matrix[torch.triu(torch.ones(300, 300), 1).bool()]
    assert float(pairs.mean()) == pytest.approx(found.chance, abs=0.01)
    assert float(pairs.std()) == pytest.approx(found.chance_sd, abs=0.01)


def test_spaces_by_hand():
    axes = torch.eye(4)
    found = space_overlap([axes[:, :2], axes[:, 1:3], axes[:, [1, 0]], axes[:, 2:]])
    assert found.matrix.tolist() == [[1, 0.5, 1, 0], [0.5, 1, 0.5, 0.5], [1, 0.5, 1, 0], [0, 0.5, 0, 1]]
    assert found.most == (0, 2) and found.chance == 0.5
    turned = torch.linalg.qr(normal(2, 2))[0].float()
    assert space_overlap([axes[:, :2] @ turned, axes[:, :2]]).matrix.tolist() == [pytest.approx([1, 1])] * 2
    narrow = space_overlap([axes[:, :1], axes])
    assert narrow.size == 1 and narrow.matrix[0, 1] == 1  # leading columns alone


@pytest.mark.parametrize("rank, width", [(1, 2), (3, 12), (5, 5)])
def test_chance_of_spaces_is_that_of_draws(rank, width):
    bases = list(torch.linalg.qr(normal(250, width, rank))[0])
    found = space_overlap(bases)
    pairs = found.matrix[torch.triu(torch.ones(250, 250), 1).bool()]
    assert float(pairs.mean()) == pytest.approx(found.chance, abs=0.01)
    assert float(pairs.std()) == pytest.approx(found.chance_sd, abs=0.01)


def test_one_expert_has_nobody_to_compare_with():
    found = choice_overlap([[1, 2]], 5)
    assert found.mean is None and found.most is None
