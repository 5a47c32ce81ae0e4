"""What one expert stores: the names and shapes of its tensors and index vectors, in the order of a bank.

Matrices are w1 (gate, or the only input projection), w3 (up, swiglu only) and w2 (down), each [J, D] with one row per
hidden neuron: J neurons now, D model width. A matrix that is stored as it is has that name; a factored one (see
`moedist.compress.matrices`) adds a dot and the name of the factor: `w1.rest`, `w1.basis`; one in few bits likewise, with names
that say how many (see `moedist.compress.lowbit`). Index vectors are int32:
`neurons` [J], which neurons of the expert before any compression these are (absent: all), and those of factors, `w1.kept`.
Behind the prefix of an expert, `layers.3.experts.17.`, these are the names in a checkpoint, so its own list of shapes says
in what form each expert is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Iterable, Mapping, Sequence

import torch

from moedist.compress import ColumnsRows, Compressed, Dense, Interpolated, LowBit, Matrix, TwoFactors
from moedist.compress.lowbit import in_order, is_codes, stored_dtype
from moedist.compress.matrices import INDEX_BYTES

MATRICES = ("w1", "w3", "w2")  # the order in a bank
PARTS = {True: {"gate": "w1", "up": "w3", "down": "w2"}, False: {"up": "w1", "down": "w2"}}  # by whether there is a gate
TENSORS: dict[type[Matrix], tuple[str, ...]] = {  # from the side of the neurons to that of the model width
    Dense: ("weight",), TwoFactors: ("left", "right"), Interpolated: ("rest", "basis"),
    ColumnsRows: ("columns", "core", "rows")}
INDICES: dict[type[Matrix], tuple[str, ...]] = {Interpolated: ("kept",), ColumnsRows: ("column_ids", "row_ids")}
GLOBAL_NAME = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(.+)")
Shape = tuple[int, ...]


def expert_prefix(layer: int, expert: int) -> str:
    """What the global names of an expert begin with."""
    return f"layers.{layer}.experts.{expert}."


@dataclass(frozen=True)
class ExpertForm:
    """Small, hashable and the same wherever the expert is.

    Attributes:
        tensors: name and shape of every trained tensor, in order.
        indices: name and length of every index vector, in order.
    """

    tensors: tuple[tuple[str, Shape], ...]
    indices: tuple[tuple[str, int], ...] = ()

    @classmethod
    def dense(cls, width: int, hidden: int, gated: bool) -> "ExpertForm":
        """All matrices as they are, [hidden, width]."""
        return cls(tuple((name, (hidden, width)) for name in MATRICES if gated or name != "w3"))

    @classmethod
    def of(cls, compressed: Compressed) -> "ExpertForm":
        """That of an expert after compression."""
        found = {**tensors_of(compressed), **indices_of(compressed)}
        return cls.from_shapes({name: tuple(tensor.shape) for name, tensor in found.items()})

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> "ExpertForm":
        """The form that has these names, given in any order.

        Raises:
            ValueError: names that do not make an expert.
        """
        gated, left = any(name.startswith("w3") for name in shapes), dict(shapes)
        tensors, indices = [], [("neurons", left.pop("neurons")[0])] if "neurons" in left else []
        for matrix in MATRICES if gated else ("w1", "w2"):
            kind = _kind_of(matrix, shapes)
            if kind is LowBit:
                names = _names(matrix, in_order(name.partition(".")[2] for name in left if name.startswith(matrix + ".")))
                tensors += [(name, tuple(left.pop(name))) for name in names]
                continue
            tensors += [(name, tuple(left.pop(name))) for name in _names(matrix, TENSORS[kind])]
            indices += [(name, left.pop(name)[0]) for name in _names(matrix, INDICES.get(kind, ()))]
        if left:
            raise ValueError(f"an expert with {sorted(shapes)} has no use for {sorted(left)}")
        form = cls(tuple(tensors), tuple(indices))
        if form.is_lowbit and not all(any(map(_in_few_bits, names)) for names in form.matrices().values()):
            raise ValueError(f"an expert with {sorted(shapes)} has some matrices in few bits and some not")
        return form

    @property
    def numbers(self) -> int:
        """Numbers, trained unless they are in few bits. A row of activations meets each once, in a multiply-add, forward."""
        if not self.is_lowbit:
            return sum(math.prod(shape) for _, shape in self.tensors)
        ranks = sum(shape[0] for name, shape in self.tensors if name.endswith(".left_scales"))
        return len(self.matrices()) * self.hidden * self.width + ranks * (self.hidden + self.width)

    @property
    def index_numbers(self) -> int:
        """Entries of index vectors."""
        return sum(length for _, length in self.indices)

    @property
    def flops_per_row(self) -> int:
        """Multiply-adds times two of one row, forward."""
        return 2 * self.numbers

    @property
    def hidden(self) -> int:
        """J, hidden neurons now."""
        (name, shape), *_ = self.tensors
        return sum(shape) if name.endswith(".rest") else shape[0]  # rest is [J - r, r]

    @property
    def width(self) -> int:
        """D."""
        if self.is_lowbit:  # down is stored transposed
            return next(shape[0] for name, shape in self.tensors if name.startswith("w2.") and _in_few_bits(name))
        return self.tensors[-1][1][-1]

    @property
    def is_dense(self) -> bool:
        """Whether every matrix is stored as it is."""
        return all(name in MATRICES for name, _ in self.tensors)

    @property
    def is_lowbit(self) -> bool:
        """Whether its matrices are stored in few bits."""
        return _in_few_bits(self.tensors[0][0])

    @property
    def gated(self) -> bool:
        """Whether there is a gate (swiglu)."""
        return any(name.startswith("w3") for name, _ in self.tensors)

    def bytes(self, itemsize: int = 4) -> int:
        """Bytes stored in weights of numbers of `itemsize` bytes (or in few bits), index vectors included."""
        return self.weight_bytes(itemsize) + self.index_numbers * INDEX_BYTES

    def weight_bytes(self, itemsize: int = 4, names: Sequence[str] | None = None) -> int:
        """Of the tensors alone, or of those called `names`."""
        return sum(math.prod(shape) * (dtype_of(name).itemsize if self.is_lowbit else itemsize)
                   for name, shape in self.tensors if names is None or name in names)

    def matrices(self) -> dict[str, tuple[str, ...]]:
        """Matrix -> the names of its tensors, from the side of the neurons to that of the model width."""
        return {matrix: tuple(name for name, _ in self.tensors if name.split(".")[0] == matrix)
                for matrix in dict.fromkeys(name.split(".")[0] for name, _ in self.tensors)}

    def split(self, blocks: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by name, as views of blocks that hold their numbers one after another."""
        flat = iter(block.view(-1) for block in blocks)
        block, start, found = next(flat, None), 0, {}
        for name, shape in self.tensors:
            if start == len(block) and math.prod(shape):
                block, start = next(flat), 0
            found[name] = block[start:start + math.prod(shape)].view(shape)
            start += math.prod(shape)
        return found

    def split_indices(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The index vectors by name, as views of all of them in one."""
        return dict(zip((name for name, _ in self.indices), flat.split([length for _, length in self.indices])))

    def stored(self, tensors: Mapping[str, torch.Tensor], indices: Mapping[str, torch.Tensor], hidden: int) -> Compressed:
        """The expert as compression sees it; `hidden` are its neurons before any compression."""
        if self.is_lowbit:
            fields = by_part(tensors)
            return Compressed(hidden, indices.get("neurons"), {
                part: LowBit.of(fields[part], self.hidden, self.width, part == "down") for part in PARTS[self.gated]})
        vectors = {name: vector for name, vector in indices.items() if name != "neurons"}
        kinds = {part: _kind_of(matrix, tensors) for part, matrix in PARTS[self.gated].items()}
        fields = by_part({**tensors, **vectors})
        return Compressed(hidden, indices.get("neurons"), {part: kind(**fields[part]) for part, kind in kinds.items()})


def tensors_of(compressed: Compressed) -> dict[str, torch.Tensor]:
    """The trained tensors of an expert by the names that a form uses."""
    return named(compressed, {part: matrix.tensors() for part, matrix in compressed.parts.items()})


def indices_of(compressed: Compressed) -> dict[str, torch.Tensor]:
    """The index vectors likewise."""
    found = {} if compressed.neurons is None else {"neurons": compressed.neurons}
    return found | named(compressed, {part: matrix.indices() for part, matrix in compressed.parts.items()})


def named(compressed: Compressed, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """part -> name -> tensor (e.g. mapped moments) by the names that a form uses."""
    matrix = PARTS["gate" in compressed.parts]
    return {name: tensor for part, tensors in parts.items() for short, tensor in tensors.items()
            for name in _names(matrix[part], (short,))}


def by_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of `named`: part -> name within a stored matrix -> tensor."""
    gated = any(name.startswith("w3") for name in tensors)
    found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS[gated]}
    for part, matrix in PARTS[gated].items():
        for name, tensor in tensors.items():
            own, _, short = name.partition(".")
            if own == matrix:
                found[part][short or "weight"] = tensor
    return found


def forms_by_expert(shapes: Mapping[str, Sequence[int]]) -> dict[int, dict[int, ExpertForm]]:
    """Layer -> expert -> form, from global names and their shapes; names that are no expert's are passed over.

    Raises:
        ValueError: an expert whose tensors do not make one.
    """
    found: dict[int, dict[int, dict[str, Shape]]] = {}
    for name, shape in shapes.items():
        match = GLOBAL_NAME.fullmatch(name)
        if match:
            layer, expert = int(match[1]), int(match[2])
            found.setdefault(layer, {}).setdefault(expert, {})[match[3]] = tuple(shape)
    return {layer: {e: ExpertForm.from_shapes(names) for e, names in experts.items()} for layer, experts in found.items()}


def dtype_of(name: str) -> torch.dtype:
    """Of a tensor of an expert in few bits."""
    return stored_dtype(name.partition(".")[2])


def _in_few_bits(name: str) -> bool:
    return is_codes(name.partition(".")[2])


def _kind_of(matrix: str, names: Iterable[str]) -> type[Matrix]:
    have = {name for name in names if name.split(".")[0] == matrix}
    if any(map(_in_few_bits, have)):
        return LowBit
    for kind, short in TENSORS.items():
        if have >= set(_names(matrix, short)):
            return kind
    raise ValueError(f"no form of a matrix has the tensors {sorted(have)} for {matrix}")


def _names(matrix: str, short: Iterable[str]) -> list[str]:
    return [matrix if name == "weight" else f"{matrix}.{name}" for name in short]
