"""How the rows of copied experts are best cut: exact, by maximum flow.

For given owners the least makespan is T* = max over sets A of experts of f(A) / s(N(A)), where N(A) are the ranks that hold
any of A. A discrete Newton method finds it: take a T, send rows from experts to their owners through a network where rank
r takes T * s_r; where not all rows get through, the minimum cut is a set A that needs a larger T, which is the next one.
Experts that have no ranks in common are apart, and one alone needs no network.
"""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from moedist.placement.cost import seconds

SCALE = 2**30  # all rows together, in the integers that the flow is computed with
ROUNDS = 50  # far more than Newton's method needs: each round cuts off a set for good

Owners = Mapping[int, tuple[int, ...]]  # of copied experts, the ranks with speed that hold them
Flow = dict[int, dict[int, float]]  # of each of them, its rows on each of those ranks, in units that `_flow` chooses


def best_shares(owners: Sequence[tuple[int, ...]], loads: Sequence[float],
                speeds: Sequence[float]) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Shares of every expert's owners, each summing to one, with the least makespan; and that makespan in seconds.

    An expert without rows is cut in proportion to its owners' speeds. Ranks without speed get no rows of an expert that has
    another owner; where it has none, the makespan is infinite.

    Args:
        owners: ranks that hold each expert, ascending, [E] tuples.
        loads: rows of every expert, [E].
        speeds: rows per second of every rank, [W].

    >>> best_shares([(0,), (0, 1)], [2.0, 6.0], [1.0, 1.0])
    (((1.0,), (0.3333333333333333, 0.6666666666666666)), 4.0)
    """
    speeds_W = np.asarray(speeds, dtype=float)
    base_W = np.zeros(len(speeds_W))  # rows of experts that only one rank can take
    shares = [(1.0,) if len(ranks) == 1 else _by_speed(ranks, speeds_W) for ranks in owners]
    flexible: dict[int, tuple[int, ...]] = {}
    for e, ranks in enumerate(owners):
        able = ranks if len(ranks) == 1 else tuple(r for r in ranks if speeds[r] > 0)
        if len(able) > 1 and loads[e] > 0:
            flexible[e] = able
        else:
            base_W[able[0] if able else ranks[0]] += loads[e]
    for part in _connected(flexible):
        if len(part) == 1:
            (e, able), = part.items()
            sent = {e: _level(loads[e], able, speeds_W, base_W)}
        else:
            sent = _cut(part, loads, speeds_W, base_W)
        for e, rows in sent.items():
            if total := sum(rows.values()):  # else too few to be seen beside those of the others
                shares[e] = tuple(rows.get(r, 0) / total for r in owners[e])
    rows_W = base_W.copy()
    for e in flexible:
        rows_W[list(owners[e])] += loads[e] * np.asarray(shares[e])
    return tuple(shares), float(seconds(rows_W, speeds_W).max())


def _connected(owners: Owners) -> list[Owners]:
    """The experts in groups that have no ranks in common."""
    found: list[tuple[set[int], dict[int, tuple[int, ...]]]] = []
    for e, ranks in owners.items():
        touched = [part for part in found if not part[0].isdisjoint(ranks)]
        found = [part for part in found if part[0].isdisjoint(ranks)]
        found.append((set(ranks).union(*(part[0] for part in touched)),
                      {**{k: v for part in touched for k, v in part[1].items()}, e: ranks}))
    return [experts for _, experts in found]


def _level(load: float, ranks: tuple[int, ...], speeds_W: np.ndarray, base_W: np.ndarray) -> dict[int, float]:
    """The rows of one expert by filling its ranks like connected vessels: those in use are done at the same time."""
    vessels = sorted((base_W[r] / speeds_W[r], speeds_W[r], r) for r in ranks)
    rows, speed, t = load, 0.0, 0.0
    for busy_s, s, _ in vessels:
        if speed and rows / speed <= busy_s:
            break
        rows, speed = rows + busy_s * s, speed + s
        t = rows / speed
    return {r: float(max(0.0, (t - busy_s) * s)) for busy_s, s, r in vessels}


def _by_speed(ranks: tuple[int, ...], speeds_W: np.ndarray) -> tuple[float, ...]:
    speeds = speeds_W[list(ranks)]
    return tuple((speeds / speeds.sum()).tolist()) if speeds.sum() > 0 else (1 / len(ranks),) * len(ranks)


def _cut(owners: Owners, loads: Sequence[float], speeds_W: np.ndarray, base_W: np.ndarray) -> Flow:
    """The rows of these experts cut for the least makespan, by discrete Newton from below."""
    holders = sorted({r for ranks in owners.values() for r in ranks})
    able = (base_W > 0) & (speeds_W > 0)
    t = float((base_W[able] / speeds_W[able]).max(initial=0.0))
    t = max(t, (base_W[holders].sum() + sum(loads[e] for e in owners)) / speeds_W[holders].sum())
    for _ in range(ROUNDS):
        rows, cut, full = _flow(owners, loads, dict(zip(holders, (t * speeds_W - base_W)[holders].tolist())))
        if not cut:
            break
        larger = (sum(loads[e] for e in cut) + base_W[full].sum()) / speeds_W[full].sum()
        if larger <= t * (1 + 1e-9):
            break
        t = larger
    return rows


def _flow(owners: Owners, loads: Sequence[float], room: dict[int, float]) -> tuple[Flow, list[int], list[int]]:
    """(rows that get through, experts whose rows do not all fit, ranks that are full because of them).

    The network's nodes: the source, the experts, the ranks, the sink.
    """
    experts, ranks = list(owners), list(room)
    first = 1 + len(experts)  # node of the first rank
    node_of, sink = {r: first + i for i, r in enumerate(ranks)}, first + len(ranks)
    scale = SCALE / sum(loads[e] for e in experts)
    supply = {e: max(1, int(loads[e] * scale)) for e in experts}
    drain = [min(SCALE, int(max(0.0, rows) * scale)) for rows in room.values()]  # down: a unit is much for a very slow rank
    heads = [range(1, first), *([node_of[r] for r in owners[e]] for e in experts), *([sink] for _ in ranks), ()]
    capacities = [*supply.values(), *(supply[e] for e in experts for _ in owners[e]), *drain]
    graph = csr_array((np.array(capacities, dtype=np.int32), np.array([n for nodes in heads for n in nodes], dtype=np.int32),
                       np.cumsum([0, *map(len, heads)], dtype=np.int32)), shape=(sink + 1, sink + 1))
    result = maximum_flow(graph, 0, sink)
    edge, into, flow = (a.tolist() for a in (result.flow.indptr, result.flow.indices, result.flow.data))
    sent: Flow = {}
    for node, e in enumerate(experts, start=1):
        by_node = dict(zip(into[edge[node]:edge[node + 1]], flow[edge[node]:edge[node + 1]]))
        sent[e] = {r: by_node.get(node_of[r], 0) for r in owners[e]}
    if result.flow_value >= sum(supply.values()) - len(supply) - len(drain):  # the rest is rounding
        return sent, [], []
    return sent, *_reached(owners, sent, [e for e in experts if sum(sent[e].values()) < supply[e]])


def _reached(owners: Owners, sent: Flow, stuck: list[int]) -> tuple[list[int], list[int]]:
    """(experts, ranks) on the source's side of the minimum cut, from the experts that have rows left: every rank of such an
    expert, and every expert with rows on such a rank."""
    guests: dict[int, list[int]] = {}
    for e, rows in sent.items():
        for r, flow in rows.items():
            if flow > 0:
                guests.setdefault(r, []).append(e)
    experts, ranks, frontier = set(stuck), set(), list(stuck)
    while frontier:
        for r in owners[frontier.pop()]:
            if r not in ranks:
                ranks.add(r)
                fresh = [e for e in guests.get(r, ()) if e not in experts]
                experts.update(fresh)
                frontier += fresh
    return sorted(experts), sorted(ranks)
