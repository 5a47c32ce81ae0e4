"""What rows did on the links between ranks in a step, summed over ranks with the step's other sums, as metrics."""

from __future__ import annotations

from typing import Sequence

import torch

from moedist.timing import Links, Traffic

LINKS = {"own": "own_island", "other": "other_islands"}
NUMBERS = ("bytes", "transfer_s", "wait_s", "rows", "pairs", "square", "square_error")


def traffic_sums(links: Links, layers: Sequence[int]) -> torch.Tensor:
    """float64 vector to be summed over ranks: of every layer and link its numbers."""
    nothing = Traffic()
    return torch.tensor([float(getattr(links.get((layer, link), nothing), name)) for layer in layers for link in LINKS
                         for name in NUMBERS], dtype=torch.float64)


def traffic_metrics(sums: torch.Tensor, layers: Sequence[int], ranks: int) -> dict[str, float]:
    """Metrics of a step from `traffic_sums` over all ranks; none where nothing travelled."""
    of_LKN = sums.view(len(layers), len(LINKS), len(NUMBERS))
    if not of_LKN[:, :, NUMBERS.index("bytes")].any():
        return {}
    values = {}
    for link, numbers in zip(LINKS.values(), of_LKN.sum(0).tolist()):
        total = dict(zip(NUMBERS, numbers))
        values |= {f"comm/{link}_bytes": total["bytes"], f"comm/{link}_ms": 1e3 * total["transfer_s"] / ranks,
                   f"comm/{link}_wait_ms": 1e3 * total["wait_s"] / ranks}
    for layer, of_links in zip(layers, of_LKN.tolist()):
        for link, numbers in zip(LINKS.values(), of_links):
            total = dict(zip(NUMBERS, numbers))
            if total["bytes"]:
                values |= {f"comm/layer.{layer}/{link}_bytes": total["bytes"],
                           f"comm/layer.{layer}/{link}_ms": 1e3 * total["transfer_s"] / ranks}
    whole = dict(zip(NUMBERS, of_LKN.sum((0, 1)).tolist()))
    if whole["pairs"]:
        values["comm/dedup_ratio"] = whole["rows"] / whole["pairs"]
    if whole["square"]:
        values["comm/rounding_error"] = (whole["square_error"] / whole["square"]) ** 0.5
    return values
