"""The consistency loss in chunks, against plain autograd."""

import pytest
import torch

from moedist.model import consistency_loss_sum
from moedist.model.loss import IGNORE

T, D, V = 7, 5, 11


def plain(first, second, head, targets):
    log_p, log_q = ((h @ head.t()).log_softmax(-1) for h in (first, second))
    each = (log_p.exp() * (log_p - log_q)).sum(-1) + (log_q.exp() * (log_q - log_p)).sum(-1)
    return (each * (targets != IGNORE)).sum() / 2


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_value_and_gradients_are_those_of_plain_autograd(chunk):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, D, dtype=torch.float64, generator=generator).requires_grad_() for n in (T, T, V)]
    targets = torch.tensor([1, IGNORE, 2, 3, 4, IGNORE, 0])
    found = consistency_loss_sum(*tensors, targets, chunk)
    expected = plain(*tensors, targets)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(2.5 * found, tensors), torch.autograd.grad(2.5 * expected, tensors)):
        torch.testing.assert_close(a, b)


def test_equal_predictions_cost_nothing():
    h, head = torch.randn(T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    assert consistency_loss_sum(h, h.clone(), head, torch.zeros(T, dtype=torch.int64)).item() == 0
    none = h[:0].clone().requires_grad_()
    consistency_loss_sum(none, none, head, torch.zeros(0, dtype=torch.int64)).backward()
    assert none.grad.shape == (0, D)
