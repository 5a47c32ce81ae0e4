"""The numbers at the head of a report: one column a run, one line a figure, as texts."""

from __future__ import annotations

from typing import Callable, Sequence

from moedist.report.read import RunData

NOTHING = "\N{EN DASH}"


def _number(name: str, form: str, unit: str = "") -> Callable[[RunData], str]:
    def text(run: RunData) -> str:
        value = run.last(name)
        return NOTHING if value is None else f"{value:{form}}{unit}"

    return text


def _text(name: str) -> Callable[[RunData], str]:
    def text(run: RunData) -> str:
        value = run.last(name)
        return NOTHING if value is None else str(value)

    return text


def _progress(run: RunData) -> str:
    return f"{run.step:,} of {run.config.train_steps:,}"


def _phases(run: RunData) -> str:
    return ", ".join(f"{name} {value if name == 'train' else value.get('method', 'cur')}" for phase in run.config.phases
                     for name, value in phase.items())


def _ranks(run: RunData) -> str:
    return str(run.plans[-1][1].world_size) if run.plans else NOTHING


def _of_bound(run: RunData) -> str:
    speed, bound = run.last("perf/tokens_per_s"), run.last("perf/tokens_per_s_bound")
    return NOTHING if not speed or not bound else f"{speed / bound:.1%}"


def _model(run: RunData) -> str:
    m = run.config.model
    return f"{m.layers} blocks, width {m.width}; {m.experts} experts in {len(run.config.moe_layers())} layers, top {m.top_k}"


LINES: dict[str, Callable[[RunData], str]] = {
    "steps": _progress,
    "training tokens": _number("train/tokens", ",.0f"),
    "training loss": _number("train/loss", ".4f"),
    "validation loss": _number("valid/loss", ".4f"),
    "validation perplexity": _number("valid/perplexity", ".2f"),
    "tokens per second": _number("perf/tokens_per_s", ",.0f"),
    "of the bound": _of_bound,
    "model FLOP/s of the measured peak": _number("perf/mfu", ".1%"),
    "step": _number("perf/step_ms", ",.1f", " ms"),
    "expert time over the bound": _number("perf/expert_over_bound", ".3f"),
    "expert load, largest over mean": _number("moe/load_imbalance", ".2f"),
    "slowest rank at the last metrics": _text("perf/slowest_rank_name"),
    "dead experts": _number("moe/dead_experts", ".0f"),
    "experts' bytes removed": _number("compress/ratio", ".1%"),
    "ranks": _ranks,
    "plans": lambda run: str(len(run.plans)),
    "model": _model,
    "router": lambda run: run.config.router.name,
    "phases": _phases,
}


def summary(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(figure, its text for every run)."""
    lines = [(name, [of(run) for run in runs]) for name, of in LINES.items()]
    return [(name, texts) for name, texts in lines if any(text != NOTHING for text in texts)]
