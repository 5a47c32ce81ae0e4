"""How the rows of copied experts are best cut: exact, by maximum flow.

For given owners the least makespan is T* = max over sets A of experts of f(A) / s(N(A)), where N(A) are the ranks that hold
any of A. A discrete Newton method finds it: take a T, send rows from experts to their owners through a network where rank
r takes T * s_r; where not all rows get through, the minimum cut is a set A that needs a larger T, which is the next one.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

SCALE = 2**30  # all rows together, in the integers that the flow is computed with
ROUNDS = 50  # far more than Newton's method needs: each round cuts off a set for good


def best_shares(owners: Sequence[tuple[int, ...]], loads: Sequence[float],
                speeds: Sequence[float]) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Shares of every expert's owners, each summing to one, with the least makespan; and that makespan in seconds.

    An expert without rows is cut in proportion to its owners' speeds.
    """
    speeds_W = np.asarray(speeds, dtype=float)
    base_W = np.zeros(len(speeds_W))
    flexible = []
    shares = [(1.0,) if len(ranks) == 1 else _by_speed(ranks, speeds_W) for ranks in owners]
    for e, ranks in enumerate(owners):
        if len(ranks) == 1:
            base_W[ranks[0]] += loads[e]
        elif loads[e] > 0:
            flexible.append(e)
    busy = base_W > 0
    least = float(np.max(base_W[busy] / np.maximum(speeds_W[busy], 1e-300), initial=0.0))
    if not flexible:
        return tuple(shares), least
    total = base_W.sum() + sum(loads[e] for e in flexible)
    holders = sorted({r for e in flexible for r in owners[e]} | set(np.flatnonzero(busy).tolist()))
    t = max(least, total / speeds_W[holders].sum())
    for _ in range(ROUNDS):
        flows, cut, cut_ranks = _flow([owners[e] for e in flexible], [loads[e] for e in flexible],
                                      np.maximum(t * speeds_W - base_W, 0.0))
        if not cut:
            break
        needed = sum(loads[flexible[i]] for i in cut) + base_W[cut_ranks].sum()
        larger = needed / speeds_W[cut_ranks].sum()
        if larger <= t * (1 + 1e-9):
            break
        t = larger
    for e, flow in zip(flexible, flows):
        shares[e] = tuple((flow / flow.sum()).tolist()) if flow.sum() > 0 else shares[e]
    rows_W = base_W.copy()
    for e in flexible:
        rows_W[list(owners[e])] += loads[e] * np.asarray(shares[e])
    used = rows_W > 0
    return tuple(shares), float(np.max(rows_W[used] / speeds_W[used]))


def _by_speed(ranks: tuple[int, ...], speeds_W: np.ndarray) -> tuple[float, ...]:
    speeds = speeds_W[list(ranks)]
    return tuple((speeds / speeds.sum()).tolist()) if speeds.sum() > 0 else (1 / len(ranks),) * len(ranks)


def _flow(owners: list[tuple[int, ...]], loads: list[float], room_W: np.ndarray) -> tuple[list[np.ndarray], list[int], list[int]]:
    """(rows of each expert to each of its owners, experts whose rows do not all fit, ranks that are full because of them)."""
    ranks = sorted({r for held in owners for r in held})
    node_of = {r: 1 + len(owners) + i for i, r in enumerate(ranks)}
    sink = 1 + len(owners) + len(ranks)
    scale = SCALE / sum(loads)
    supply = [max(1, int(load * scale)) for load in loads]
    edges = [(0, 1 + i, n) for i, n in enumerate(supply)]
    edges += [(1 + i, node_of[r], supply[i]) for i, held in enumerate(owners) for r in held]
    # rounded up: at the T that fits exactly, all of it must get through
    edges += [(node_of[r], sink, min(SCALE, int(np.ceil(room_W[r] * scale)) + 1)) for r in ranks]
    sources, targets, capacities = (np.array(column, dtype=np.int32) for column in zip(*edges))
    graph = csr_array((capacities, (sources, targets)), shape=(sink + 1, sink + 1))
    result = maximum_flow(graph, 0, sink)
    flow = result.flow.tocsr()
    triples = flow.tocoo()
    taken = dict(zip(zip(triples.row.tolist(), triples.col.tolist()), triples.data.tolist()))
    rows = [np.array([max(0, taken.get((1 + i, node_of[r]), 0)) for r in held], dtype=float) for i, held in enumerate(owners)]
    if result.flow_value >= sum(supply) - len(supply):
        return rows, [], []
    # nodes that the source still reaches in the residual network: the experts there need more room
    residual = (graph - flow).tocsr()
    reached, frontier = {0}, [0]
    while frontier:
        node = frontier.pop()
        for k in range(residual.indptr[node], residual.indptr[node + 1]):
            other = int(residual.indices[k])
            if residual.data[k] > 0 and other not in reached:
                reached.add(other)
                frontier.append(other)
    return rows, [i for i in range(len(owners)) if 1 + i in reached], [r for r in ranks if node_of[r] in reached]
