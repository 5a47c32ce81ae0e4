"""What watching a run costs: time in sums, the collective, alerts, JSONL, Weights & Biases and the progress line, over that of
the training steps.

A run of the quickstart's shapes is trained with everything on (Weights & Biases offline), on as many ranks as started,
and both parts of the same steps are timed in turn. What the ranks wait for each other in the logging collective is counted as
logging, although they would wait in the next step otherwise. Weights & Biases writes in a process of its own, whose time is not
in it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch

from moedist.bench.figures import write_figures
from moedist.config import check_config, config_from_dict
from moedist.coordinator import written_plan
from moedist.phases.train import log_step, note_step, train_step
from moedist.trainer import build_run
from moedist.world import World

CONFIG: dict[str, Any] = {
    "name": "bench-logging", "data": {"tokenizer": "byte", "sequence_length": 128, "max_documents": 150},
    "model": {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "experts": 8, "top_k": 2, "expert_hidden": 128},
    "train": {"batch": 32}, "placement": {"planner": "equal"}, "phases": [{"train": 1_000_000}],
    "monitor": {"wandb": "offline", "output": "plain"},
}
WARM_UP = 5


def bench_logging(steps: int, log_every: int, json_path: str | None) -> dict[str, float]:
    """Measure and print, on as many ranks as it is started on.

    Returns:
        `logging.overhead_fraction`, over all steps, and what it is made of.
    """
    with tempfile.TemporaryDirectory(prefix="bench-logging-") as folder:
        config = config_from_dict(CONFIG, [f"folder={folder}", f"monitor.log_every={log_every}"])
        with World.start(config.world) as world:
            check_config(config, world.size)
            run = build_run(config, world, written_plan(config, world.size, None)[0])
            run.model.train()
            run.watch.start(run)
            training, noting, logging = [], [], []
            for i in range(WARM_UP + steps):
                start = time.perf_counter()
                report = train_step(run)
                trained = time.perf_counter()
                note_step(run, report)
                noted = time.perf_counter()
                if run.progress.step % log_every == 0:
                    log_step(run, report)
                if i >= WARM_UP:
                    training.append(trained - start)
                    noting.append(noted - trained)
                    if run.progress.step % log_every == 0:
                        logging.append(time.perf_counter() - noted)
            mine = torch.tensor([(sum(noting) + sum(logging)) / sum(training), 1e3 * statistics.median(training),
                                 1e3 * statistics.median(noting), 1e3 * statistics.median(logging or [0.0])],
                                dtype=torch.float64)
            names = ("overhead_fraction", "step_ms", "every_step_ms", "logging_step_ms")
            figures = {f"logging.{name}": value for name, value in zip(names, world.all_reduce_(mine, "max").tolist())}
            run.recorder.close()
            world.barrier()
            if world.is_main:
                print(f"{steps} steps on {world.size} rank(s), logged every {log_every}; of the slowest rank:")
                for name, value in figures.items():
                    print(f"  {name} {value:.3g}")
                write_figures(figures, json_path)
    return figures
