"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from moedist.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0) of `total_steps`: linear warm-up, then cosine, linear or constant.

    The last step has `lr * min_lr_ratio` (unless constant); the first of n warm-up steps has lr / n.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, total_steps - 1 - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
