"""All that is told of one expert, gathered where the expert is, in plain numbers and text that travel as JSON.

D model width, J neurons of the expert now, V words: the tokens that occur in the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
import torch

from moedist.compress import Calibration, Expert
from moedist.data import Tokenizer
from moedist.model import ExpertForm
from moedist.neurons.directions import basis, largest, mixture, read_weights, reads, vocabulary, writes
from moedist.neurons.overlap import Overlap, choice_overlap, space_overlap
from moedist.neurons.record import NeuronRecord
from moedist.neurons.tokens import TopTokens, context, distinct

DIMENSIONS, WORDS, EXAMPLES = 4, 5, 3  # told of each neuron
MOST_COUNTED = 10_000_000
LEADING = 32  # neurons, by Fisher score, that tell which words an expert writes: the vocabulary is long
OVERLAPS = {"read_space": "space read", "write_space": "space written", "read_dimensions": "dimensions read",
            "write_dimensions": "dimensions written", "tokens": "tokens written"}


class Words:
    """Token ids as people read them.

    Args:
        ids: the text that is watched, in sequences of `length` tokens.

    Attributes:
        used: int64 [V], ids that occur in (the first `MOST_COUNTED` tokens of) it, ascending. Training has only pushed the
            others away from whatever was written: they would head every list.
    """

    def __init__(self, tokenizer: Tokenizer, ids: np.ndarray, length: int):
        self._tokenizer, self._names = tokenizer, dict(tokenizer.vocabulary())
        self.ids, self.length = ids, length
        self.used = torch.from_numpy(np.unique(ids[:MOST_COUNTED]).astype(np.int64))

    def token(self, i: int) -> str:
        """Text of one token; the vocabulary's own name for one that is no text: the end of a text, half a character."""
        text = self.decode([i])
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"<{self._names.get(i, i)}>"

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(ids)

    def examples(self, found: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
        """(token's place, activation) with what stands around it."""
        told = []
        for key, h in distinct(found, self.ids, self.length, EXAMPLES):
            before, after = context(self.ids, key, self.length, self.decode)
            told.append({"activation": h, "before": before, "token": self.token(int(self.ids[key])), "after": after})
        return told


@dataclass(frozen=True)
class Surroundings:
    """What lies between an expert and the residual stream on one side, the output on the other.

    Attributes:
        norm_D: weight of the norm in front of the layer; last_norm_D: of that before the output; head_VD: rows of
            the output embedding.
    """

    norm_D: torch.Tensor
    last_norm_D: torch.Tensor
    head_VD: torch.Tensor


def of_most_fisher(calibration: Calibration, most: int) -> torch.Tensor:
    """int64: positions of the neurons with the largest scores, largest first."""
    return calibration.fisher.sort(descending=True, stable=True).indices[:most]


def expert_facts(layer: int, e: int, form: ExpertForm, itemsize: int, calibration: Calibration, tokens: int,
                 history: Sequence[tuple[int, NeuronRecord]], whole: int) -> dict[str, Any]:
    """One expert on one line.

    Args:
        tokens: that the layer has seen, of which `calibration` has a part.
        history: of its compressions; whole: its neurons before them.
    """
    rows, shares = float(calibration.rows), [record.fisher_kept for _, record in history]
    known = None not in shares and (len(history[0][1].neurons) if history else form.hidden) == whole
    kept = math.prod(shares) if known else None  # of what was there at first, as if training in between had moved nothing
    return {"layer": layer, "expert": e, "hidden": form.hidden, "hidden_before": whole,
            "fisher_kept": kept, "fisher": float(calibration.fisher.sum()),
            "frequency": rows / max(tokens, 1), "router_weight": float(calibration.weight) / rows if rows else None,
            "bytes": form.bytes(itemsize), "form": form_words(form), "compressions": [step for step, _ in history]}


def form_words(form: ExpertForm) -> str:
    """ "dense", or how many directions each matrix goes through."""
    if form.is_dense:
        return "dense"
    shapes = dict(form.tensors)
    ranks = [str(shapes[names[0]][1]) if len(names) > 1 else "all" for names in form.matrices().values()]
    return f"rank {'/'.join(ranks)}"


def neuron_facts(expert: Expert, ids: Sequence[int], calibration: Calibration, chosen: torch.Tensor, top: TopTokens,
                 around: Surroundings, words: Words) -> list[dict[str, Any]]:
    """The neurons of an expert by Fisher score, largest first, and of the `chosen` ones, the first of them, all there is.

    Args:
        ids: of the J neurons, before any compression.
        top: tokens of the chosen ones.
    """
    order = of_most_fisher(calibration, expert.hidden).tolist()
    shares = (calibration.fisher / calibration.fisher.sum().clamp(min=torch.finfo(torch.float32).tiny)).tolist()
    some = expert.select(chosen)
    read, written = reads(some, around.norm_D), writes(some)
    logits = vocabulary(some.down, around.head_VD, around.last_norm_D)
    told: list[dict[str, Any]] = [{"neuron": int(ids[j]), "fisher_share": shares[j]} for j in order]
    for i, of_neuron in enumerate(told[:len(chosen)]):
        of_neuron |= {
            "reads": [{"dimension": d, "share": s} for d, s in largest(read[i], DIMENSIONS)],
            "writes": [{"dimension": d, "share": s} for d, s in largest(written[i], DIMENSIONS)],
            "raises": [{"token": words.token(int(words.used[v])), "deviations": z}
                       for v, z in largest(logits[i], WORDS)],
            "lowers": [{"token": words.token(int(words.used[v])), "deviations": -z}
                       for v, z in largest(-logits[i], WORDS)],
            "tokens": words.examples(top.of(i)),
        }
    return told


def dropped_facts(history: Sequence[tuple[int, NeuronRecord]]) -> list[dict[str, Any]]:
    """Neurons that are gone, most Fisher mass first, with who stands in for them."""
    told = []
    for step, record in history:
        total = float(record.fisher.sum()) or 1.0
        fisher = dict(zip(record.neurons.tolist(), record.fisher.tolist()))
        for k, neuron in enumerate(record.dropped.tolist()):
            of_neuron = {"neuron": neuron, "step": step, "fisher_share": fisher[neuron] / total}
            if record.stand_in is not None:
                of_neuron |= {"explained": float(record.explained[k]), "stand_ins": [
                    {"neuron": j, "weight": w}
                    for j, w in zip(record.stand_in[k].tolist(), record.stand_in_weight[k].tolist())]}
            told.append(of_neuron)
    return sorted(told, key=lambda d: (-d["fisher_share"], d["neuron"]))


def curve_facts(history: Sequence[tuple[int, NeuronRecord]], calibration: Calibration) -> dict[str, Any]:
    """Fisher scores of an expert's neurons, falling, with which of them stayed: of its last compression, else of now."""
    if not history:
        fisher = calibration.fisher.sort(descending=True).values.tolist()
        return {"step": None, "fisher": fisher, "kept": [True] * len(fisher)}
    return curve_of(*history[-1])


def curve_of(step: int, record: NeuronRecord) -> dict[str, Any]:
    """Fisher scores of an expert's neurons before a compression, falling, with which of them it kept."""
    kept = set(record.kept.tolist())
    pairs = sorted(zip(record.fisher.tolist(), record.neurons.tolist()), key=lambda pair: (-pair[0], pair[1]))
    return {"step": step, "fisher": [f for f, _ in pairs], "kept": [n in kept for _, n in pairs]}


def profile(expert: Expert, calibration: Calibration, around: Surroundings) -> dict[str, Any]:
    """What an expert as a whole reads and writes, to be compared with others of its layer: neurons weigh by Fisher score."""
    width, vocab = expert.width, len(around.head_VD)
    lead = of_most_fisher(calibration, LEADING)
    tokens = vocabulary(expert.down[lead], around.head_VD, around.last_norm_D).square()
    chosen = {"read_dimensions": (mixture(reads(expert, around.norm_D), calibration.fisher), max(1, width // 8)),
              "write_dimensions": (mixture(writes(expert), calibration.fisher), max(1, width // 8)),
              "tokens": (mixture(tokens, calibration.fisher[lead]), max(1, min(50, vocab // 20)))}
    rank = max(1, width // 8)
    return {"read_space": basis(torch.cat(read_weights(expert, around.norm_D)), rank).cpu(),
            "write_space": basis(expert.down, rank).cpu(),
            **{name: [i for i, _ in largest(row, k)] for name, (row, k) in chosen.items()}}


def overlaps(profiles: Mapping[int, Mapping[str, Any]], width: int, vocab: int) -> dict[str, Overlap]:
    """Of the experts of one layer, by what is compared."""
    of_all = [profiles[e] for e in sorted(profiles)]
    found = {}
    for name in OVERLAPS:
        parts = [of_one[name] for of_one in of_all]
        found[name] = space_overlap(parts) if "space" in name else choice_overlap(parts, vocab if name == "tokens" else width)
    return found


def overlap_facts(layer: int, name: str, overlap: Overlap) -> dict[str, Any]:
    """An overlap as JSON."""
    return {"layer": layer, "what": name, "size": overlap.size, "of": overlap.of, "chance": overlap.chance,
            "chance_sd": overlap.chance_sd, "mean": overlap.mean, "most": overlap.most, "matrix": overlap.matrix.tolist()}
