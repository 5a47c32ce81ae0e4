"""Methods and ratios side by side on one checkpoint: perplexity, bytes, FLOPs and seconds, nothing trained.

Experts are watched once for all methods. Each result is put in place of the experts as dense matrices of the old shape (what
was dropped is zero), evaluated, and taken out again.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
import yaml
from tqdm import tqdm

from moedist.bench.figures import write_figures
from moedist.checkpoint import RunFolder
from moedist.compress import METHODS, Budget, Compressed, Curve, Method, build_method, decide
from moedist.config import check_config, for_ranks
from moedist.data import EvalStream, TrainStream, prepare_corpus
from moedist.errors import CompressError, DataError
from moedist.model import Transformer
from moedist.model.forms import ExpertForm
from moedist.phases.calibrate import Calibrations, Source, dense_expert, watch_experts
from moedist.phases.evaluation import held_out_loss
from moedist.phases.restore import open_run
from moedist.phases.run import DTYPES
from moedist.phases.shrink import all_or_none, merged
from moedist.text_table import table
from moedist.world import World, find_launch

RATIOS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GLOBAL = ("cur", "cur-hybrid", "interp")  # whose gains compare over experts and parts; the others are cut uniformly


@dataclass(frozen=True)
class Variant:
    """A method with options under a name of its own, and its budget mode."""

    name: str
    method: Method
    budget: str


@dataclass(frozen=True)
class Point:
    """One method at one ratio. `ppl_ratio` is over the uncompressed model; bytes and FLOPs are of all experts."""

    method: str
    ratio: float
    perplexity: float
    ppl_ratio: float
    bytes: int
    flops_ratio: float
    seconds: float


def variants(names: Sequence[str]) -> list[Variant]:
    """Methods by name; `NAME+OPTION=VALUE+...` sets options, and `budget=MODE` the budget.

    >>> variants(["cur+least_squares=false+budget=uniform"])[0].budget
    'uniform'
    """
    found = []
    for text in names:
        name, options, budget = parse_variant(text)
        found.append(Variant(text, build_method(name, **options), budget))
    return found


def parse_variant(text: str) -> tuple[str, dict[str, Any], str]:
    """(method, options, budget mode) of `NAME+OPTION=VALUE+...`.

    Raises:
        CompressError: an option without a value.
    """
    name, *options = text.split("+")
    given = parse_options(options, text, "cur+selection=fisher")
    return name, given, given.pop("budget", "global" if name in GLOBAL else "uniform")


def parse_options(options: Sequence[str], text: str, example: str) -> dict[str, Any]:
    """{NAME: VALUE} of "NAME=VALUE", ...

    Raises:
        CompressError: an option of `text` without a value.
    """
    if bad := [option for option in options if "=" not in option]:
        raise CompressError(f"{text!r}: write an option as NAME=VALUE, not {bad[0]!r}, such as {example}")
    return {key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in options)}


def sweep_run(run_folder: str, methods: Sequence[str] = tuple(METHODS), ratios: Sequence[float] = RATIOS,
              tokens: int = 65536, split: str = "valid", eval_tokens: int | None = None, overrides: Sequence[str] = (),
              step: int | None = None, out: str | None = None, json_path: str | None = None) -> list[Point]:
    """Print the table; write CSV and PNG to `out` and figures to `json_path`.

    Args:
        tokens: training tokens that the experts are watched on; eval_tokens: of the split (None: as in training).

    Raises:
        CheckpointError, CompressError, DataError.
    """
    folder = RunFolder(run_folder)
    config, _ = for_ranks(folder.config(list(overrides)), find_launch().size)
    check_config(config, find_launch().size)
    chosen = variants(methods)
    with World.start(config.world) as world:
        opened = open_run(folder, config, world, step)
        model, corpus, length = opened.model, prepare_corpus(config.data), config.data.sequence_length
        if not all(form.is_dense for bank in model.banks.values() for form in bank.forms):
            raise CompressError(f"{folder} holds factored experts; sweep a checkpoint from before their compression (--step)")
        held_out = getattr(corpus, split)
        if held_out is None:
            raise DataError(f"the text of {folder} has no {split} split; use --split valid or train")
        source = Source(TrainStream(corpus.train, length, config.seed), 0, max(1, -(-tokens // length)),
                        max(config.train.batch // config.train.accumulate, world.size), DTYPES[config.train.dtype])
        sweep = _Sweep(model, world, source, EvalStream(held_out, length, eval_tokens or config.train.eval_tokens),
                       max(config.train.batch, world.size))
        points = sweep.run(chosen, ratios)
        if world.is_main:
            _report(points, sweep, f"{run_folder} step {opened.step}, {split} split", out, json_path)
        return points


class _Sweep:
    """The model, what its experts have seen, and their weights as they were."""

    def __init__(self, model: Transformer, world: World, source: Source, stream: EvalStream, sequences: int):
        self.model, self.world, self.stream = model, world, stream
        self.sequences, self.source = sequences, source
        self.weights = {i: tuple(w.clone() for w in bank.weights()) for i, bank in model.banks.items()}
        self.base = self._perplexity()

    def run(self, chosen: Sequence[Variant], ratios: Sequence[float]) -> list[Point]:
        needs = frozenset().union(*(v.method.needs for v in chosen))
        bar = tqdm(total=len(chosen) * len(ratios), unit="model", leave=False, disable=not self.world.is_main or None)
        calibrations = watch_experts(self.model, self.world, self.source, list(self.model.banks), needs)
        points = []
        with bar:
            for variant in chosen:
                bar.set_description(variant.name)
                curves: dict[str, Any] = {}  # of the first round, the same at every ratio
                for ratio in ratios:
                    points.append(self._point(variant, ratio, calibrations, curves))
                    bar.update(1)
        return points

    def _point(self, variant: Variant, ratio: float, calibrations: Calibrations, curves: dict[str, Any]) -> Point:
        method, start = variant.method, time.perf_counter()
        experts = {key: dense_expert(dict(self.model.moe_layers())[key[0]], key[1]) for key in calibrations}

        def gains(decided: Mapping[Any, Any]) -> Mapping[Any, list[Curve]]:
            if decided or "first" not in curves:
                with all_or_none(self.world):
                    found = {key: method.gains(expert, calibrations[key], decided.get(key, {}))
                             for key, expert in experts.items()}
                gathered = merged(self.world.gather_objects(found))
                if decided:
                    return gathered
                curves["first"] = gathered
            return curves["first"]

        itemsize = next(iter(self.model.banks.values())).dtype.itemsize
        frequency = merged(self.world.gather_objects({key: float(c.rows) for key, c in calibrations.items()}))
        keep = decide(method, gains, Budget(ratio), variant.budget, frequency=frequency, itemsize=itemsize)
        with all_or_none(self.world):
            compressed = {key: method.compress(expert, calibrations[key], keep[key]) for key, expert in experts.items()}
        seconds = time.perf_counter() - start
        numbers = [0, 0, 0]
        for key, new in compressed.items():
            numbers[0] += new.bytes
            numbers[1] += ExpertForm.of(new).flops_per_row
            numbers[2] += 2 * experts[key].numbers
        size, flops, whole = torch.tensor(self.world.gather_objects(numbers)).sum(0).tolist()
        self._put(compressed)
        perplexity = self._perplexity()
        self._restore()
        return Point(variant.name, ratio, perplexity, perplexity / self.base, size, flops / whole, seconds)

    def _put(self, compressed: Mapping[tuple[int, int], Compressed]) -> None:
        for (layer, e), new in compressed.items():
            bank = self.model.banks[layer]
            padded = new.padded()
            parts = [part for part in ("gate", "up") if part in padded.parts]
            w_in, w_out = bank.blocks_of(e, bank.weights())
            w_in.copy_(torch.cat([padded.parts[part] for part in parts]))
            w_out.copy_(padded.down)

    def _restore(self) -> None:
        for i, bank in self.model.banks.items():
            for weight, before in zip(bank.weights(), self.weights[i]):
                weight.copy_(before)

    def _perplexity(self) -> float:
        return held_out_loss(self.model, self.stream, self.world, self.source.dtype, self.sequences).perplexity


def figures_of(points: Sequence[Point]) -> dict[str, float]:
    """`compress.{method}.{ratio}.ppl_ratio`."""
    return {f"compress.{p.method}.{p.ratio:g}.ppl_ratio": p.ppl_ratio for p in points}


def _report(points: Sequence[Point], sweep: _Sweep, title: str, out: str | None, json_path: str | None) -> None:
    ratios = list(dict.fromkeys(p.ratio for p in points))
    by_name: dict[str, dict[float, Point]] = {}
    for p in points:
        by_name.setdefault(p.method, {})[p.ratio] = p
    print(f"{title}: perplexity {sweep.base:.2f}; over it after removing a share of the experts' bytes, nothing trained")
    print(table(["method", *(f"{100 * r:g} %" for r in ratios), "seconds at " + f"{100 * ratios[-1]:g} %"],
                [[name, *(f"{of[r].ppl_ratio:.3f}" for r in ratios), f"{of[ratios[-1]].seconds:.1f}"]
                 for name, of in by_name.items()]))
    write_figures(figures_of(points), json_path)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        with open(Path(out) / "sweep.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Point)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(p) for p in points)
        from moedist.compressing.plot import plot_sweep  # matplotlib, only when a picture is asked for
        plot_sweep(points, sweep.base, title, Path(out) / "sweep.png")
        print(f"written: {Path(out) / 'sweep.csv'}, {Path(out) / 'sweep.png'}")
