"""Counts of the routing of a text, summed over passes and ranks, and the facts that are made of them."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch

from moedist.monitor.balance import layer_balance
from moedist.routing import Assignment
from moedist.traces.affinity import affinity, conditional, entropy_bits, joint_mass
from moedist.traces.consistency import best_segments, cache_hits, independent_histogram, segment_histogram
from moedist.world import World

Facts = dict[str, Any]


def trace_of(routed: Assignment, shape: tuple[int, int], experts: int) -> torch.Tensor:
    """bool [G, S, E] on the CPU: which experts each token of a pass goes to.

    Args:
        shape: G, S.
    """
    active_TE = torch.zeros(shape[0] * shape[1], experts, dtype=torch.bool)
    active_TE[routed.token_ids_N.cpu(), routed.expert_ids_N.cpu()] = True
    return active_TE.view(*shape, experts)


class RoutingRecord:
    """Counts of some layers.

    Args:
        experts: of each layer that is recorded.
        segments: tokens of a segment; caches: experts that a cache holds, of each layer.
    """

    def __init__(self, experts: Mapping[int, int], segments: Sequence[int], caches: Sequence[int]):
        self.layers, self.segments, self.caches = list(experts), list(segments), list(caches)
        self.pairs = list(zip(self.layers, self.layers[1:]))
        self._tokens = torch.zeros(1, dtype=torch.int64)
        self._rows = {i: torch.zeros(e, dtype=torch.int64) for i, e in experts.items()}
        self._entropy = {i: torch.zeros(2, dtype=torch.float64) for i in self.layers}  # sum, and of how many tokens
        self._segments = {(i, m): torch.zeros(e, m + 1, dtype=torch.int64)
                          for i, e in experts.items() for m in self.segments}
        self._hits = {i: torch.zeros(len(self.segments), len(self.caches), dtype=torch.int64) for i in self.layers}
        self._joint = {(i, j): torch.zeros(experts[i], experts[j], dtype=torch.float64) for i, j in self.pairs}

    def add(self, traces: Mapping[int, torch.Tensor]) -> None:
        """Take in one pass: the traces [G, S, E] of all layers."""
        for i in self.layers:
            active = traces[i]
            self._rows[i] += active.sum((0, 1))
            for k, m in enumerate(self.segments):
                self._segments[i, m] += segment_histogram(active, m)
                for c, size in enumerate(self.caches):
                    self._hits[i][k, c] += cache_hits(active, m, size)
        for i, j in self.pairs:
            self._joint[i, j] += joint_mass(traces[i], traces[j])
        shape = next(iter(traces.values())).shape
        self._tokens += shape[0] * shape[1]

    def add_entropy(self, layer: int, entropy: float, tokens: int) -> None:
        """The sum over so many tokens of the entropy of the router's distribution, in nats."""
        self._entropy[layer] += torch.tensor([entropy, tokens], dtype=torch.float64)

    def sum_over(self, world: World) -> None:
        """Sum all counts over ranks, on every rank. Collective."""
        for counts in (self._rows, self._entropy, self._segments, self._hits, self._joint):
            for tensor in counts.values():
                world.all_reduce_(tensor)
        world.all_reduce_(self._tokens)

    def facts(self) -> Facts:
        """Everything, as plain numbers: `layers`, their `mean`, and `affinity` of each pair of layers."""
        layers = [self._layer(i) for i in self.layers]
        mean = {key: _mean([layer[key] for layer in layers]) for key in (
            "load_imbalance", "load_cv", "unused_experts", "utilisation", "experts_a_token", "router_entropy", "segments")}
        return {"tokens": int(self._tokens), "layers": layers, "mean": mean,
                "affinity": [{"layer": i, "next": j, **affinity(joint), "conditional": conditional(joint).tolist(),
                              "share": (joint.sum(0) / joint.sum().clamp(min=1e-300)).tolist()}
                             for (i, j), joint in self._joint.items()]}

    def _layer(self, i: int) -> Facts:
        rows_E, tokens = self._rows[i], max(int(self._tokens), 1)
        total, experts = max(int(rows_E.sum()), 1), len(rows_E)
        entropy, measured = self._entropy[i].tolist()
        balance = layer_balance(rows_E.unsqueeze(0), [float(rows_E.sum())])
        ordered = rows_E.sort(descending=True).values.cumsum(0)
        segments = []
        for k, m in enumerate(self.segments):
            best = best_segments(self._segments[i, m])
            segments.append({"m": m, "srp": best.srp, "size_ratio": best.size_ratio,
                             "srp_by_frequency": best_segments(independent_histogram(rows_E / tokens, m)).srp,
                             "srp_of_experts": [best_segments(row.unsqueeze(0)).srp for row in self._segments[i, m]],
                             "caches": [{"size": size, "sch": hits / total,
                                         "most_frequent": float(ordered[min(size, experts) - 1]) / total}
                                        for size, hits in zip(self.caches, self._hits[i][k].tolist())]})
        return {"layer": i, "experts": experts, "rows": rows_E.tolist(), "experts_a_token": int(rows_E.sum()) / tokens,
                "load_imbalance": balance.get("load_imbalance"), "load_cv": balance.get("load_cv"),
                "unused_experts": balance.get("unused_experts"),
                "utilisation": 2 ** entropy_bits(rows_E) / experts,
                "router_entropy": entropy / measured / torch.tensor(float(experts)).log().item() if measured and experts > 1
                else None, "segments": segments}


def _mean(values: Sequence[Any]) -> Any:
    """Of numbers, or of what lists and dicts of one shape hold; None where any is unknown."""
    if any(v is None for v in values):
        return None
    if isinstance(values[0], dict):
        return {key: _mean([v[key] for v in values]) for key in values[0] if key != "srp_of_experts"}
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values)]
    return sum(values) / len(values)
