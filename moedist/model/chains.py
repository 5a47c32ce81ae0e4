"""A weight matrix W [J, D] as a product of factors, W = M_1 M_2 ... M_k, and the thin GEMMs it stands for.

Activations are columns here: of n rows x [n, D], h = W x^T is [J, n]. So a permutation of neurons copies whole rows of
memory, and each neuron's gate and up lie apart for the activation. Two sweeps do everything:
    up    v_k = x^T, v_{i-1} = M_i v_i     forward of an input projection (h = v_0), backward of a down projection
    down  u_1 = h,   u_{i+1} = M_i^T u_i   forward of a down projection (y^T = u_{k+1}), backward of an input projection
Where both have passed, the gradient of a factor is u_i v_i^T: of the two, one came forward and one backward.
The kept rows of an interpolative form make M_1 = P [I; rest], P a permutation; only `rest` is stored, and multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from moedist.model.forms import ExpertForm


@dataclass(frozen=True)
class Factor:
    """One factor: where its numbers are in a flat tensor, and its shape.

    Attributes:
        order: int64 [J], where it is P [I; rest]: neurons that the rows of [I; rest] belong to. None: a plain matrix.
        inverse: of that permutation.
    """

    where: slice
    shape: tuple[int, int]
    order: Optional[torch.Tensor] = None
    inverse: Optional[torch.Tensor] = None

    @property
    def rows(self) -> int:
        """Rows of the factor, those of the identity included."""
        return self.shape[0] if self.order is None else len(self.order)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The stored numbers, as a view."""
        return flat[self.where].view(self.shape)


Chain = tuple[Factor, ...]


def chains_of(form: ExpertForm, start: int, indices: torch.Tensor) -> list[Chain]:
    """The chains of an expert whose numbers begin at `start`, in the order of its form; `indices` are its index vectors."""
    vectors, shapes, found = form.split_indices(indices), dict(form.tensors), []
    for matrix, names in form.matrices().items():
        factors = []
        for name in names:
            rows, columns = shapes[name]
            where = slice(start, start + rows * columns)
            permutation = _permutation(vectors[f"{matrix}.kept"], rows) if name.endswith(".rest") else ()
            factors.append(Factor(where, (rows, columns), *permutation))
            start = where.stop
        found.append(tuple(factors))
    return found


def up(chain: Chain, flat: torch.Tensor, v: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    """Fill `out` with v_0, ..., v_{k-1}, each [rows of M_{i+1}, n], from v = v_k [D, n]."""
    for factor, target in zip(reversed(chain), reversed(out)):
        matrix = factor.of(flat)
        if factor.order is None:
            torch.mm(matrix, v, out=target)
        else:
            stacked = torch.empty_like(target)  # [I; rest] v
            stacked[:len(v)] = v
            torch.mm(matrix, v, out=stacked[len(v):])
            torch.index_select(stacked, 0, factor.inverse, out=target)
        v = target


def down(chain: Chain, flat: torch.Tensor, u: torch.Tensor, out: Sequence[torch.Tensor], y: torch.Tensor) -> None:
    """Fill `out` with u_2, ..., u_k, each [columns of M_{i-1}, n], and y [n, D] with u_{k+1}^T, from u = u_1 [J, n]."""
    for factor, target in zip(chain[:-1], out):
        _transposed(factor, factor.of(flat), _picked(factor, u), target)
        u = target
    torch.mm(u.t(), chain[-1].of(flat), out=y)


def up_gradients(chain: Chain, flat: torch.Tensor, grad: torch.Tensor, u: Sequence[torch.Tensor],
                 dy: torch.Tensor, out: torch.Tensor) -> None:
    """Backward of `down`: the factors' gradients into the flat `grad`, and that of u_1 into `out` [J, n].

    Args:
        u: u_1, ..., u_k as `down` had them.
        dy: [n, D], gradient of y.
    """
    v = dy.t()
    for i in reversed(range(len(chain))):
        factor = chain[i]
        _gradient(factor, _picked(factor, u[i]), v, grad)
        target = out if i == 0 else out.new_empty(factor.rows, v.shape[1])
        up((factor,), flat, v, (target,))
        v = target


def down_gradients(chain: Chain, flat: torch.Tensor, grad: torch.Tensor, v: Sequence[torch.Tensor], dh: torch.Tensor,
                   dx: torch.Tensor, add: bool) -> None:
    """Backward of `up`: the factors' gradients into the flat `grad`, and that of x into `dx` [n, D], or added to it.

    Args:
        v: v_1, ..., v_k as `up` had them, v_k = x^T included.
        dh: [J, n], gradient of v_0.
    """
    u = dh
    for i, factor in enumerate(chain):
        matrix, u = factor.of(flat), _picked(factor, u)
        _gradient(factor, u, v[i], grad)
        if i + 1 < len(chain):
            target = dh.new_empty(matrix.shape[1], u.shape[1])
            _transposed(factor, matrix, u, target)
            u = target
        elif add:
            dx.addmm_(u.t(), matrix)
        else:
            torch.mm(u.t(), matrix, out=dx)


def _picked(factor: Factor, u: torch.Tensor) -> torch.Tensor:
    """P^T u where there is a permutation: the rows of the identity first."""
    return u if factor.order is None else u.index_select(0, factor.order)


def _transposed(factor: Factor, matrix: torch.Tensor, picked: torch.Tensor, out: torch.Tensor) -> None:
    """out = M^T u, of u as `_picked` gives it."""
    if factor.order is None:
        torch.mm(matrix.t(), picked, out=out)
    else:
        torch.addmm(picked[:len(out)], matrix.t(), picked[len(out):], out=out)


def _gradient(factor: Factor, picked: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> None:
    """u v^T into `grad`, of u as `_picked` gives it; rows of the identity have none."""
    torch.mm(picked[len(picked) - factor.shape[0]:], v.t(), out=factor.of(grad))


def _permutation(kept: torch.Tensor, others: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, inverse), int64 [J]: the kept neurons as they are named, then the others ascending."""
    kept, neurons = kept.long(), len(kept) + others
    place = torch.full((neurons,), neurons, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    order = place.argsort(stable=True)
    return order, order.argsort()
