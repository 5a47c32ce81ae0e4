"""Experts, tokens and settings that the compression tests share. Float64 throughout, so that tolerances are tight."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from moedist.compress import Calibration, Expert, calibrate
from moedist.compress.weighting import Weighting

quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**31 - 1)
PLAIN = Weighting(None, None, 1.0)


@st.composite
def shapes_and_ranks(draw, most: int = 12) -> tuple[int, int, int]:
    """m, n and a rank of a matrix [m, n]."""
    m, n = draw(st.integers(1, most)), draw(st.integers(1, most))
    return m, n, draw(st.integers(1, min(m, n)))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A normal tensor drawn from its seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """[m, n] with singular values that fall by a factor of 100: like weights, unlike noise."""
    u, _, vh = torch.linalg.svd(normal(m, n, seed=seed), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, -2, min(m, n), dtype=torch.float64)) @ vh


def positive(n: int, seed: int = 0) -> torch.Tensor:
    """[n, n] a second moment of full rank with unequal directions."""
    tokens = normal(3 * n + 2, n, seed=seed) * torch.logspace(0, -1, n, dtype=torch.float64)
    return tokens.t() @ tokens


def make_expert(hidden: int = 24, width: int = 8, gated: bool = True, seed: int = 0,
                dtype: torch.dtype = torch.float64) -> Expert:
    """Weights of the usual size; neurons of unequal importance."""
    size = torch.logspace(0.5, -0.5, hidden, dtype=torch.float64).unsqueeze(1) / width**0.5
    gate, up, down = (normal(hidden, width, seed=seed + i) * size for i in range(3))
    return Expert(gate.to(dtype) if gated else None, up.to(dtype), down.to(dtype))


def tokens_of(expert: Expert, n: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs [n, D], and gradients of some loss at the outputs, small as those of a mean are."""
    mix = normal(expert.width, expert.width, seed=seed + 10) / expert.width**0.5
    x = normal(n, expert.width, seed=seed + 11) @ mix
    return x.to(expert.up.dtype), (normal(n, expert.width, seed=seed + 12) * 1e-3).to(expert.up.dtype)


def calibrated(expert: Expert, n: int = 200, seed: int = 0, **options) -> Calibration:
    """The calibration of `tokens_of` them."""
    return calibrate(expert, *tokens_of(expert, n, seed), **{"dtype": torch.float64, **options})


def same(a: Expert, b: Expert) -> bool:
    """Whether two experts are equal, bitwise."""
    return a.parts.keys() == b.parts.keys() and all(torch.equal(a.parts[part], b.parts[part]) for part in a.parts)


def trained(hidden: int = 64, width: int = 16, gated: bool = True, seed: int = 0, n: int = 600,
            steps: int = 200) -> tuple[Expert, Calibration, torch.Tensor]:
    """An expert fitted to a function of its inputs, its calibration under that loss, and its inputs."""
    expert = make_expert(hidden, width, gated, seed)
    x, _ = tokens_of(expert, n, seed)
    target = torch.sin(3 * x @ normal(width, width, seed=seed + 20) / width**0.5)
    parts = {part: matrix.clone().requires_grad_() for part, matrix in expert.parts.items()}
    optimizer = torch.optim.Adam(parts.values(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (Expert.of(parts)(x) - target).square().mean().backward()
        optimizer.step()
    expert = Expert.of({part: matrix.detach() for part, matrix in parts.items()})
    grad = 2 * (expert(x) - target) / target.numel()
    return expert, calibrate(expert, x, grad, dtype=torch.float64), x
