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
from moedist.model import LayerReport
from moedist.monitor import Alert, traffic_sums
from moedist.phases.evaluation import held_out_loss
from moedist.phases.non_finite import find_non_finite
from moedist.phases.profile import Profile
from moedist.phases.run import Run
from moedist.placement import split_batch
from moedist.timing import StepTimes, region

# summed over ranks once a step, in the collective of the gradient norm
SUMS = ("loss", "balance_loss", "z_loss", "router_loss", "entropy", "dropped_rows", "stop", "save", "plan", "written")


@dataclass(frozen=True)
class StepReport:
    """What one step was.

    Attributes:
        sums: sums over ranks by name.
        grad_norm: of dense and expert gradients together, before clipping.
        loads: rows every rank sent to every expert, [W, E], by layer.
        ranks: what every rank did, and how long it took.
        rows_P: rows that each placement computed, [P], by layer.
        times: of this rank, by layer; wall_s, waiting_s: of all the step, and of that in collectives.
        traffic: of all ranks, see `traffic_metrics`.
        skipped: no weight has changed: gradients were not finite.
    """

    sums: dict[str, float]
    grad_norm: float
    loads: dict[int, torch.Tensor]
    ranks: RankTimes
    rows_P: dict[int, torch.Tensor]
    times: StepTimes
    wall_s: float
    waiting_s: float
    traffic: torch.Tensor
    skipped: bool


class Stopped(Exception):
    """A signal asked for an end; the checkpoint is written."""


def train_phase(run: Run, steps: int) -> None:
    """Train until `steps` steps of this phase are done.

    Raises:
        Stopped: after SIGTERM or SIGINT on any rank, with a checkpoint written.
        MoedistError: the loss or a gradient is not finite, and `monitor.on_non_finite` is stop, or too many steps were
            skipped; the last good checkpoint stays.
    """
    config, progress = run.config, run.progress
    run.model.train()
    watch, profile = run.watch, Profile(run)
    watch.start(run)
    watch.restart()
    while progress.phase_step < steps:
        profile.before_step()
        report = train_step(run)
        if line := first_step():
            run.recorder.say(line)
        profile.after_step()
        note_step(run, report)
        sums = report.sums
        run.saving(sums["written"] == run.world.size)
        _see_to_non_finite(run, sums["loss"], report)
        last = progress.phase_step == steps
        if progress.step % config.monitor.log_every == 0 or last or sums["stop"]:
            log_step(run, report)
        if config.train.eval_every and progress.step % config.train.eval_every == 0 or last:
            evaluate(run)
            watch.restart()
        if sums["stop"]:
            run.save()
            raise Stopped
        if config.checkpoint.every and progress.step % config.checkpoint.every == 0 or last or sums["save"]:
            run.signals.save = False
            run.save(periodic=True)
            watch.restart()
        run.replan(report.loads, report.ranks, bool(sums["plan"]))


def train_step(run: Run) -> StepReport:
    """One optimizer step.

    The global batch is cut into `accumulate` parts and each part over the ranks, so that neither the number of ranks nor
    their shares change what a part holds. All ranks make the same collective calls, zero sequences included.
    """
    config, progress, t, world = run.config, run.progress, run.config.train, run.world
    sequence = config.data.sequence_length
    counts = split_batch(t.batch // t.accumulate, run.plan.batch_shares)
    tokens = t.batch * sequence
    world.meter.begin(progress.step)
    sums: dict[str, float | torch.Tensor] = dict.fromkeys(SUMS, 0.0)  # tensors until the end: one sync, not one a layer
    loads: dict[int, torch.Tensor] = {}
    demands: dict[int, torch.Tensor] = {}
    rows_P: dict[int, torch.Tensor] = {}
    for batch, targets in run.batches(progress.step, progress.sequences):
        loss, reports = run.engine.forward(batch, targets, run.dtype)
        sums["loss"] = sums["loss"] + loss.detach()
        with region("backward"):
            run.engine.backward((loss + _weighted_aux(run, reports, sums)) / tokens)
        for layer, report in reports.items():
            loads[layer] = loads.get(layer, 0) + report.load_WE
            demands[layer] = demands.get(layer, 0) + report.demand_E
            rows_P[layer] = rows_P.get(layer, 0) + report.rows_P
    _sum_over_islands(run, loads, demands, rows_P)
    sums["stop"], sums["save"] = float(bool(run.signals.stop)), float(run.signals.save)
    sums["plan"], sums["written"] = float(run.coordinator.ready), float(run.saver.written)
    times = world.meter.take()
    seconds = torch.zeros(2, world.size, dtype=torch.float64)
    seconds[:, world.rank] = torch.tensor([sum(times.expert_s.values()), times.dense_s])
    lr = learning_rate(t, progress.step, config.train_steps)
    packed = torch.cat([torch.tensor([float(sums[k]) for k in SUMS], dtype=torch.float64), seconds.flatten(),
                        traffic_sums(times.links, config.moe_layers())])
    with region("optimizer"):
        result = run.engine.step(lr, packed)
    for layer, moe in run.model.moe_layers():
        moe.after_step(demands[layer])
    progress.step += 1
    progress.phase_step += 1
    progress.sequences += t.batch
    summed, of_ranks, traffic = result.sums.tensor_split([len(SUMS), len(SUMS) + seconds.numel()])
    expert_s, dense_s = of_ranks.view(2, -1).tolist()
    ranks = RankTimes(_of_ranks(run, rows_P), [n * t.accumulate * sequence for n in counts], expert_s, dense_s,
                      _of_ranks(run, rows_P, run.coordinator.sizes.costs))
    return StepReport(dict(zip(SUMS, summed.tolist())), result.grad_norm, loads, ranks, rows_P, times, *world.meter.whole(),
                      traffic, result.skipped)


def _sum_over_islands(run: Run, *of_layers: dict[int, torch.Tensor]) -> None:
    """Counts of layers whose islands have not told each other in every layer: from now on those of all, in place."""
    world = run.world
    layers = [i for i, moe in run.model.moe_layers() if moe.dispatcher.layout.plan.islands]
    if not layers:
        return
    mine = [found[i] for found in of_layers for i in layers]
    flat = torch.cat([counts.flatten().double() for counts in mine])
    if world.rank != world.islands.index(world.islands[world.rank]):  # all ranks of an island know the same
        flat.zero_()
    world.all_reduce_(flat)
    for (found, i), counts, total in zip(((found, i) for found in of_layers for i in layers), mine,
                                         flat.split([counts.numel() for counts in mine])):
        found[i] = total.view_as(counts).to(counts.dtype)


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
    total: torch.Tensor | float = 0.0
    for layer, moe in run.model.moe_layers():
        report, weights = reports[layer], moe.router.loss_weights()
        for name, value in report.aux_losses.items():
            weighted = weights[name] * value
            total = total + weighted
            if name in sums:
                sums[name] = sums[name] + value.detach()
            else:  # a loss of this router's own
                sums["router_loss"] = sums["router_loss"] + weighted.detach()
        for name, value in report.stats.items():
            sums[name] = sums[name] + value
    return total


def evaluate(run: Run) -> None:
    """Record loss and perplexity of the validation split."""
    start = time.perf_counter()
    run.evaluated_at = run.progress.step
    run.held_out = result = held_out_loss(run.model, run.valid_stream, run.world, run.dtype,
                                          max(run.config.train.batch, run.world.size), routing=run.watch.routing)
    values = {"valid/loss": result.loss, "valid/perplexity": result.perplexity}
    if result.stability is not None:
        values["moe/routing_stability"] = result.stability
    run.record(values, f"step {run.progress.step:>6}  valid loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  "
                       f"({result.tokens} tokens, {time.perf_counter() - start:.1f} s)")


def note_step(run: Run, report: StepReport) -> None:
    """Take a step into the sums that metrics are made of, look at its loss, and show it."""
    tokens = run.config.train.batch * run.config.data.sequence_length
    loss = report.sums["loss"] / tokens
    run.watch.add(run, report)
    run.watch.alert_loss(run, loss)
    run.watch.tick(run, loss, tokens)


def log_step(run: Run, report: StepReport) -> None:
    """Record what the steps since the last time were. Every rank must call it."""
    config, step, sums, norm, watch = run.config, run.progress.step, report.sums, report.grad_norm, run.watch
    tokens, layers, start = config.train.batch * config.data.sequence_length, max(len(config.routed_layers()), 1), time.perf_counter()
    values = watch.metrics(run, report)
    if run.world.is_main:
        loss = sums["loss"] / tokens
        values |= {"train/loss": loss, "train/perplexity": math.exp(min(loss, 700.0)), "train/grad_norm": norm,
                   "train/lr": learning_rate(config.train, step - 1, config.train_steps),
                   "perf/tokens_per_s": 1e3 * tokens / values["perf/step_ms"]}
        if report.loads:
            rows = sum(int(load.sum()) for load in report.loads.values())
            values |= {
                "train/balance_loss": sums["balance_loss"] / tokens / layers, "train/z_loss": sums["z_loss"] / tokens / layers,
                "train/router_loss": sums["router_loss"] / tokens / layers,
                "moe/router_entropy": sums["entropy"] / tokens / layers,
                "moe/dropped_fraction": sums["dropped_rows"] / max(rows + sums["dropped_rows"], 1)}
        run.record(values, f"step {step:>6}/{config.train_steps}  loss {loss:.4f}  lr {values['train/lr']:.2e}  "
                           f"grad {norm:.2f}  {values['perf/tokens_per_s']:,.0f} tokens/s  ETA {run.recorder.eta(step)}")
    watch.logging_s = time.perf_counter() - start
    watch.restart()


def _see_to_non_finite(run: Run, loss: float, report: StepReport) -> None:
    """Where the loss or a gradient is not finite: tell where that began, and stop, or go on without the step."""
    watch, c, norm = run.watch, run.config.monitor, report.grad_norm
    if math.isfinite(loss) and (math.isfinite(norm) or run.config.train.dtype == "float16"):  # it scales its loss by this
        watch.skipped_in_a_row = 0
        return
    run.finish_saving()  # all ranks are here: the loss is that of all
    where = find_non_finite(run)
    watch.skipped, watch.skipped_in_a_row = watch.skipped + report.skipped, watch.skipped_in_a_row + 1
    goes_on = c.on_non_finite == "skip" and report.skipped and watch.skipped_in_a_row <= c.max_skips
    text = f"loss {loss}, gradient norm {norm}: {where.describe(run.recorder.rank_name)}"
    run.recorder.alert(run.progress.step, Alert("not finite", text, fatal=not goes_on))
    if goes_on:
        run.recorder.say(f"step {run.progress.step:>6}  skipped ({watch.skipped_in_a_row} in a row, {c.max_skips} allowed)")
        return
    steps = run.folder.steps()
    last = f"; the last checkpoint is of step {steps[-1]}" if steps else ""
    raise MoedistError(f"step {run.progress.step}: {text}{last}; training has diverged: lower train.lr (now "
                       f"{run.config.train.lr:g}) or raise train.warmup_steps"
                       + (f"; {watch.skipped_in_a_row - 1} steps before were skipped" if watch.skipped_in_a_row > 1 else ""))
