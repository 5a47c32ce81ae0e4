"""Refuse what cannot work before any rank starts, and say what can but is hardly meant."""

from __future__ import annotations

from moedist.config import Config, check_config
from moedist.engine import check_deepspeed
from moedist.phases.compress import check_methods
from moedist.routing import check_router


def check_training(config: Config, ranks: int) -> list[str]:
    """Check a configuration for so many ranks.

    Returns:
        What is allowed but leaves ranks without work, a sentence each.

    Raises:
        MoedistError: the first thing that cannot work.
    """
    check_config(config, ranks)
    check_methods(config)
    check_router(config)
    check_deepspeed(config)
    notices, t, experts = [], config.train, config.model.experts
    together = t.batch // t.accumulate
    if together < ranks:
        notices.append(f"{ranks} ranks share {together} sequences of a forward pass (train.batch / train.accumulate): "
                       f"{ranks - together} of them will only compute experts; set train.batch={ranks * t.accumulate} or more")
    held = experts + config.placement.max_copies
    if config.moe_layers() and held < ranks:
        notices.append(f"{ranks} ranks share {experts} experts of a layer: in every layer {ranks - held} of them will have "
                       "none; set model.experts higher, placement.max_copies, or take fewer ranks")
    return notices
