"""The chunked loss against torch's, with gradients."""

import pytest
import torch
from torch.nn import functional as F

from moedist.model.loss import IGNORE, next_token_loss_sum


@pytest.mark.parametrize("tokens, chunk", [(10, 3), (9, 3), (5, 100), (0, 4)])
def test_equals_cross_entropy(tokens, chunk):
    torch.manual_seed(0)
    hidden, head = torch.randn(tokens, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    targets = torch.randint(0, 7, (tokens,))
    if tokens:
        targets[::3] = IGNORE
    a, b = [(hidden.clone().requires_grad_(), head.clone().requires_grad_()) for _ in range(2)]
    loss = next_token_loss_sum(*a, targets, chunk)
    expected = F.cross_entropy(b[0] @ b[1].t(), targets, ignore_index=IGNORE, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    (3 * loss).backward()
    (3 * expected).backward()
    for x, y in zip(a, b):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)


def test_low_precision_and_no_grad():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(50, 16), torch.randn(30, 16), torch.randint(0, 30, (50,))
    exact = F.cross_entropy(hidden @ head.t(), targets, reduction="sum")
    with torch.no_grad():
        low = next_token_loss_sum(hidden.bfloat16(), head, targets)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=2e-2)
