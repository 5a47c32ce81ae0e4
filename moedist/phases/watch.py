"""What a run knows of how it goes: sums of the steps since the last metrics, and what is made of them when it is time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from moedist.config import Config
from moedist.monitor import (Alert, Alerts, LoadHistory, RankSums, RoutingMemory, gather_sums, load_metrics, measured_peak,
                             memory_held, rank_metrics, spread_evenly, traffic_metrics)
from moedist.placement import Plan

if TYPE_CHECKING:
    from moedist.phases.run import Run
    from moedist.phases.train import StepReport

KEYS_A_LAYER = 4 + 4  # metrics of one layer: balance, and links


class Watch:
    """Of one rank, in one run. Every rank has one; rank 0's sees loads and raises alerts."""

    def __init__(self, run: "Run"):
        config = run.config
        self.routing = RoutingMemory()
        self.plans, self.moved = 0, 0
        self.skipped = self.skipped_in_a_row = 0
        self.logging_s = self.checkpoint_bytes = 0.0  # of the newest
        self._alerts = Alerts(config.monitor, run.folder.path)
        self._loads = LoadHistory(config.monitor.dead_after)
        self._sums, self._peak, self._plan = RankSums(), 0.0, ""
        self._layers = spread_evenly(config.moe_layers(), config.monitor.layer_keys // KEYS_A_LAYER)
        self._dense_flops = dense_flops_per_token(config, run.engine.dense_size, run.model.embedding.num_embeddings)
        self._shown: dict[str, str] = {}
        self.restart()

    def start(self, run: "Run") -> None:
        """Training starts: see what this rank can do at most."""
        if not self._peak:
            self._peak = measured_peak(run.world.device, run.dtype, run.world.meter.throttle.slowdown)

    def restart(self) -> None:
        """Sums and the clock start anew, after metrics or after something that is no training."""
        self._sums, self._start = RankSums(), time.perf_counter()
        self._loads.restart()

    @property
    def seconds_per_step(self) -> float:
        """Mean wall time of the steps since `restart`."""
        return (time.perf_counter() - self._start) / max(self._sums.steps, 1)

    def add(self, run: "Run", report: "StepReport") -> None:
        """Take in one step."""
        rank, rows, flops = run.world.rank, 0.0, 0.0
        for layer, moe in run.model.moe_layers():
            rows_P = report.rows_P[layer][moe.dispatcher.layout.local_P].tolist()
            rows += sum(rows_P)
            flops += sum(n * f for n, f in zip(rows_P, moe.bank.flops_per_row))
        tokens = report.ranks.tokens[rank]
        self._sums.add(report.times, report.wall_s, report.waiting_s, rows, tokens, 3 * flops + self._dense_flops * tokens)
        if run.world.is_main:
            self._loads.add(report.loads)

    def plan_changed(self, moved: int = 0) -> None:
        """Another plan is in force, by which so many placements are new."""
        self.plans += 1
        self.moved += moved

    def alert_loss(self, run: "Run", loss: float) -> None:
        """Look at the loss of a step."""
        if run.world.is_main and math.isfinite(loss) and (alert := self._alerts.loss(loss)):
            run.recorder.alert(run.progress.step, alert)

    def metrics(self, run: "Run", report: "StepReport") -> dict[str, float | str]:
        """`perf`, `moe`, `rank`, `plan` and `comm` metrics, and alerts; every rank must call it, after the same steps."""
        step_s = self.seconds_per_step
        self._sums.memory_bytes, self._sums.peak = float(memory_held(run.world.device)), self._peak
        ranks = gather_sums(run.world, self._sums)
        run.recorder.record_rank(run.progress.step, {f"rank/{name}": value for name, value in self._sums.values().items()}
                                 | {"train/tokens": run.tokens_read})
        if not run.world.is_main:
            return {}
        values = {"train/skipped_steps": float(self.skipped), "perf/step_ms": 1e3 * step_s, **rank_metrics(ranks, step_s),
                  **load_metrics(report.loads, report.ranks.rows, run.plan.speeds, self._layers),
                  **self._loads.metrics(self._layers), **self._plan_metrics(run.plan)}
        values["perf/slowest_rank_name"] = run.recorder.rank_name(int(values["perf/slowest_rank"]))
        if self.logging_s:
            values["perf/logging_ms"] = 1e3 * self.logging_s
        if "moe/expert_ms" in values and run.plan.predicted_ms:
            values["plan/actual_ms"] = values["moe/expert_ms"]
        travelled = traffic_metrics(report.traffic, run.config.moe_layers(), run.world.size)
        hidden = {f"comm/layer.{i}/" for i in run.config.moe_layers() if i not in self._layers}
        values |= {name: value for name, value in travelled.items() if not name.startswith(tuple(hidden) or "-")}
        run.recorder.record_loads(run.progress.step, self._loads.sums)
        self._shown = {"memory": f"{values['perf/memory_gib']:.1f} GiB", "slowest": values["perf/slowest_rank_name"]}
        self._tell_alerts(run, ranks)
        return values

    def tick(self, run: "Run", loss: float, tokens: int) -> None:
        """Show a step on the progress bar."""
        seconds = self.seconds_per_step
        run.recorder.tick(run.progress.step, run.phase_name, {
            "loss": f"{loss:.3f}", "tokens/s": f"{tokens / seconds:,.0f}", **self._shown})

    def _plan_metrics(self, plan: Plan) -> dict[str, float]:
        found = {"plan/version": float(self.plans), "plan/moved_experts": float(self.moved),
                 "plan/copies": float(sum(len(owners) - 1 for _, layer in plan.layers for owners in layer.owners))}
        self.moved = 0
        return found | ({"plan/predicted_ms": max(plan.predicted_ms)} if plan.predicted_ms else {})

    def _tell_alerts(self, run: "Run", ranks: list[RankSums]) -> None:
        names = [run.recorder.rank_name(r) for r in range(len(ranks))]
        actual = [rank.values()["expert_ms"] for rank in ranks]
        found: list[Alert | None] = [
            self._alerts.dead(self._loads.dead()), self._alerts.disk(self.checkpoint_bytes),
            self._alerts.slow(run.plan.predicted_ms, actual, names, run.plan.sha256)]
        for alert in found:
            if alert is not None:
                run.recorder.alert(run.progress.step, alert)


def dense_flops_per_token(config: Config, dense_size: int, vocab: int) -> float:
    """FLOPs of a token outside routed experts, forward and backward: 6 a weight, and attention's 12 L H C S (Chowdhery et al.
    2022, arXiv 2204.02311, appendix B). The embedding is looked up, not multiplied, and counts only where it is the output
    projection too."""
    m = config.model
    multiplied = dense_size - (0 if m.tie_embeddings else vocab * m.width)
    return 6.0 * multiplied + 12.0 * m.layers * m.heads * m.head * config.data.sequence_length
