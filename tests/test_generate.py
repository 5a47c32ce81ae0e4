"""Drawing tokens."""

import torch

from moedist.generate import draw


def test_draw():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    generator = torch.Generator().manual_seed(0)
    assert draw(logits, 0, 50, generator) == 1
    assert draw(logits, 5.0, 1, generator) == 1
    drawn = [draw(logits, 1.0, 2, generator) for _ in range(200)]
    assert set(drawn) == {1, 3} and 70 < drawn.count(1) < 135
    assert set(draw(logits, 100.0, 0, generator) for _ in range(200)) == {0, 1, 2, 3}
