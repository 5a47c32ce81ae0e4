"""The train phase: n optimizer steps, with evaluation, checkpoints and a clean end on signals."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Mapping, Sequence

import torch

from moedist.coordinator import RankTimes
from moedist.engine import learning_rate
from moedist.errors import MoedistError
from moedist.milestones import first_step
from moedist.model import Batch, LayerReport
from moedist.monitor import load_metrics, traffic_metrics, traffic_sums
from moedist.phases.evaluation import held_out_loss
from moedist.phases.run import Run
from moedist.placement import split_batch
from moedist.routing import mix_seeds
from moedist.timing import StepTimes

# summed over ranks once a step, in the collective of the gradient norm
SUMS = ("loss", "balance_loss", "z_loss", "entropy", "dropped_rows", "stop", "save", "plan", "written")


@dataclass(frozen=True)
class StepReport:
    """What one step was.

    Attributes:
        sums: sums over ranks by name.
        grad_norm: of dense and expert gradients together, before clipping.
        loads: rows every rank sent to every expert, [W, E], by layer.
        ranks: what every rank did, and how long it took.
        times: of this rank, by layer.
        traffic: of all ranks, see `traffic_metrics`.
    """

    sums: dict[str, float]
    grad_norm: float
    loads: dict[int, torch.Tensor]
    ranks: RankTimes
    times: StepTimes
    traffic: torch.Tensor


class Stopped(Exception):
    """A signal asked for an end; the checkpoint is written."""


def train_phase(run: Run, steps: int) -> None:
    """Train until `steps` steps of this phase are done.

    Raises:
        Stopped: after SIGTERM or SIGINT on any rank, with a checkpoint written.
        MoedistError: the loss is not finite; the last good checkpoint stays.
    """
    config, progress = run.config, run.progress
    run.model.train()
    clock = _Clock()
    while progress.phase_step < steps:
        report = train_step(run)
        if clock.steps == 0 and (line := first_step()):
            run.recorder.say(line)
        clock.steps += 1
        sums = report.sums
        run.saving(sums["written"] == run.world.size)
        _refuse_non_finite(run, sums["loss"], report.grad_norm)
        run.recorder.tick(progress.step)
        last = progress.phase_step == steps
        if progress.step % config.monitor.log_every == 0 or last or sums["stop"]:
            _log(run, report, clock)
        if config.train.eval_every and progress.step % config.train.eval_every == 0 or last:
            evaluate(run)
            clock = _Clock()
        if sums["stop"]:
            run.save()
            raise Stopped
        if config.checkpoint.every and progress.step % config.checkpoint.every == 0 or last or sums["save"]:
            run.signals.save = False
            run.save(periodic=True)
            clock = _Clock()
        run.replan(report.loads, report.ranks, bool(sums["plan"]))


def train_step(run: Run) -> StepReport:
    """One optimizer step.

    The global batch is cut into `accumulate` parts and each part over the ranks, so that neither the number of ranks nor
    their shares change what a part holds. All ranks make the same collective calls, zero sequences included.
    """
    config, progress, t, world = run.config, run.progress, run.config.train, run.world
    sequence, part = config.data.sequence_length, t.batch // t.accumulate
    counts = split_batch(part, run.plan.batch_shares)
    offset, mine = sum(counts[:world.rank]), counts[world.rank]
    tokens = t.batch * sequence
    world.meter.begin(progress.step)
    torch.manual_seed(mix_seeds(config.seed, progress.step, world.rank))  # dropout: a resumed run draws the same
    sums: dict[str, float | torch.Tensor] = dict.fromkeys(SUMS, 0.0)  # tensors until the end: one sync, not one a layer
    loads: dict[int, torch.Tensor] = {}
    demands: dict[int, torch.Tensor] = {}
    rows_P: dict[int, torch.Tensor] = {}
    for i in range(t.accumulate):
        inputs, targets = run.train_stream.batch(progress.sequences + i * part + offset, mine)
        keys = torch.arange(i * part + offset, i * part + offset + mine).unsqueeze(1) * sequence + torch.arange(sequence)
        loss, reports = run.engine.forward(Batch(inputs, keys, mix_seeds(config.seed, progress.step)), targets, run.dtype)
        sums["loss"] = sums["loss"] + loss.detach()
        run.engine.backward((loss + _weighted_aux(run, reports, sums)) / tokens)
        for layer, report in reports.items():
            loads[layer] = loads.get(layer, 0) + report.load_WE
            demands[layer] = demands.get(layer, 0) + report.demand_E
            rows_P[layer] = rows_P.get(layer, 0) + report.rows_P
    sums["stop"], sums["save"] = float(bool(run.signals.stop)), float(run.signals.save)
    sums["plan"], sums["written"] = float(run.coordinator.ready), float(run.saver.written)
    times = world.meter.take()
    seconds = torch.zeros(2, world.size, dtype=torch.float64)
    seconds[:, world.rank] = torch.tensor([sum(times.expert_s.values()), times.dense_s])
    lr = learning_rate(t, progress.step, config.train_steps)
    result = run.engine.step(lr, torch.cat([torch.tensor([float(sums[k]) for k in SUMS], dtype=torch.float64),
                                            seconds.flatten(), traffic_sums(times.links, config.moe_layers())]))
    for layer, moe in run.model.moe_layers():
        if config.router.bias_rate:
            moe.router.update_bias(demands[layer])
    progress.step += 1
    progress.phase_step += 1
    progress.sequences += t.batch
    summed, of_ranks, traffic = result.sums.tensor_split([len(SUMS), len(SUMS) + seconds.numel()])
    expert_s, dense_s = of_ranks.view(2, -1).tolist()
    ranks = RankTimes(_of_ranks(run, rows_P), [n * t.accumulate * sequence for n in counts], expert_s, dense_s,
                      _of_ranks(run, rows_P, run.coordinator.sizes.costs))
    return StepReport(dict(zip(SUMS, summed.tolist())), result.grad_norm, loads, ranks, times, traffic)


def _of_ranks(run: Run, rows_P: dict[int, torch.Tensor],
              costs: Mapping[int, Sequence[float]] | None = None) -> dict[int, list[int]]:
    """Rows of every rank by layer, from those of every placement; each times what a row of its expert costs."""
    found = {}
    for layer, moe in run.model.moe_layers():
        layout, cost_E = moe.dispatcher.layout, (costs or {}).get(layer)
        rows = rows_P[layer] if cost_E is None else rows_P[layer] * torch.tensor(cost_E)[layout.expert_P]
        found[layer] = layout.rows_of_ranks(rows)
    return found


def _weighted_aux(run: Run, reports: dict[int, LayerReport],
                  sums: dict[str, float | torch.Tensor]) -> torch.Tensor | float:
    """Weighted router losses of all layers, summed over local tokens; adds their values and statistics to `sums`."""
    weights = {"balance_loss": run.config.router.balance_loss, "z_loss": run.config.router.z_loss}
    total: torch.Tensor | float = 0.0
    for report in reports.values():
        for name, value in report.aux_losses.items():
            sums[name] = sums[name] + value.detach()
            total = total + weights[name] * value
        for name, value in report.stats.items():
            sums[name] = sums[name] + value
    return total


def evaluate(run: Run) -> None:
    """Record loss and perplexity of the validation split."""
    start = time.perf_counter()
    run.evaluated_at = run.progress.step
    run.held_out = result = held_out_loss(run.model, run.valid_stream, run.world, run.dtype,
                                          max(run.config.train.batch, run.world.size))
    run.recorder.record(run.progress.step, {"valid/loss": result.loss, "valid/perplexity": result.perplexity},
                        f"step {run.progress.step:>6}  valid loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
                        f"({result.tokens} tokens, {time.perf_counter() - start:.1f} s)")


def _log(run: Run, report: StepReport, clock: "_Clock") -> None:
    config, step, sums, loads, norm = run.config, run.progress.step, report.sums, report.loads, report.grad_norm
    tokens, layers = config.train.batch * config.data.sequence_length, max(len(loads), 1)
    values = {
        "train/loss": sums["loss"] / tokens,
        "train/grad_norm": norm,
        "train/lr": learning_rate(config.train, step - 1, config.train_steps),
        "train/tokens": run.progress.sequences * config.data.sequence_length,
        "perf/step_ms": 1e3 * clock.seconds_per_step(),
        "perf/tokens_per_s": tokens / clock.seconds_per_step(),
    }
    if loads:
        rows = sum(int(load.sum()) for load in loads.values())
        values |= {
            "train/balance_loss": sums["balance_loss"] / tokens / layers, "train/z_loss": sums["z_loss"] / tokens / layers,
            "moe/router_entropy": sums["entropy"] / tokens / layers,
            "moe/dropped_fraction": sums["dropped_rows"] / max(rows + sums["dropped_rows"], 1),
            **load_metrics(loads.values(), report.ranks.rows.values()),
            "moe/expert_ms": 1e3 * max(report.ranks.expert_s), "moe/expert_over_mean": report.ranks.expert_over_mean,
            **traffic_metrics(report.traffic, config.moe_layers(), run.world.size),
        }
    line = (f"step {step:>6}/{config.train_steps}  loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
            f"grad {norm:.2f}  {values['perf/tokens_per_s']:,.0f} tokens/s  ETA {run.recorder.eta(step)}")
    run.recorder.record(step, values, line)
    clock.restart()


def _refuse_non_finite(run: Run, loss: float, norm: float) -> None:
    if math.isfinite(loss) and (math.isfinite(norm) or run.config.train.dtype == "float16"):
        return
    run.finish_saving()  # all ranks are here: the loss is that of all
    steps = run.folder.steps()
    last = f"; the last checkpoint is of step {steps[-1]}" if steps else ""
    raise MoedistError(f"step {run.progress.step}: loss {loss}, gradient norm {norm}: training has diverged{last}; lower "
                       f"train.lr (now {run.config.train.lr:g}) or raise train.warmup_steps")


class _Clock:
    """Mean time of the steps since the last line."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start, self.steps = time.perf_counter(), 0

    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self.start) / max(self.steps, 1)
