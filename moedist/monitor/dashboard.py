"""`moedist dashboard`: a Weights & Biases workspace as code, with a section for every question that people ask of a run."""

from __future__ import annotations

import json
import os
from typing import Any

from moedist.config import MonitorConfig
from moedist.errors import ConfigError
from moedist.monitor.wandb_run import wandb_mode

X = "train/tokens"
# section -> title of a panel -> its metrics; * stands for the ranks that get lines of their own
SECTIONS: dict[str, dict[str, list[str]]] = {
    "Training": {"loss": ["train/loss", "valid/loss"], "perplexity": ["train/perplexity", "valid/perplexity"],
                 "auxiliary losses": ["train/balance_loss", "train/z_loss", "train/router_loss"],
                 "gradient norm": ["train/grad_norm"],
                 "learning rate": ["train/lr"], "skipped steps": ["train/skipped_steps"]},
    "Speed": {"tokens per second": ["perf/tokens_per_s", "perf/tokens_per_s_bound"], "step (ms)": ["perf/step_ms"],
              "model FLOP/s over measured peak": ["perf/mfu"], "expert time over the bound": ["perf/expert_over_bound"],
              "memory (GiB)": ["perf/memory_gib"], "slowest rank": ["perf/slowest_rank"]},
    "Ranks": {f"{name.replace('_', ' ')}": [f"rank/*/{name}"] for name in
              ("busy_ms", "expert_ms", "all_to_all_ms", "wait_ms", "rows_per_s", "rows", "memory_gib")},
    "Experts": {"imbalance of experts": ["moe/load_imbalance"], "variation of loads": ["moe/load_cv"],
                "imbalance of ranks": ["moe/rank_imbalance", "moe/expert_over_mean"],
                "dead and unused experts": ["moe/dead_experts", "moe/unused_experts"],
                "router entropy": ["moe/router_entropy"], "routing stability": ["moe/routing_stability"],
                "dropped rows": ["moe/dropped_fraction"]},
    "Links": {"bytes": ["comm/own_island_bytes", "comm/other_islands_bytes"],
              "time (ms)": ["comm/own_island_ms", "comm/other_islands_ms"],
              "waiting (ms)": ["comm/own_island_wait_ms", "comm/other_islands_wait_ms"],
              "rows sent over rows without dedup": ["comm/dedup_ratio"], "rounding": ["comm/rounding_error"]},
    "Plan": {"version": ["plan/version"], "moved experts and copies": ["plan/moved_experts", "plan/copies"],
             "predicted and actual (ms)": ["plan/predicted_ms", "plan/actual_ms"]},
    "Compression": {"share removed": ["compress/ratio"], "bytes of experts": ["compress/bytes"],
                    "seconds": ["compress/seconds"]},
    "Checkpoints": {"training stood still (ms)": ["checkpoint/blocked_ms"], "seconds": ["checkpoint/seconds"],
                    "bytes": ["checkpoint/bytes"]},
}


def dashboard(name: str, ranks: int) -> dict[str, Any]:
    """The dashboard as plain data: sections of panels, each a plot of metrics over training tokens."""
    def expanded(metrics: list[str]) -> list[str]:
        return [metric.replace("*", str(r)) for metric in metrics for r in range(ranks if "*" in metric else 1)]

    return {"name": name, "sections": [
        {"name": section, "panels": [{"title": title, "x": X, "y": expanded(metrics)} for title, metrics in panels.items()]}
        for section, panels in SECTIONS.items()]}


def make_dashboard(entity: str | None, project: str, name: str, ranks: int, json_path: str | None) -> str:
    """Save the dashboard to Weights & Biases and return its address; without a key, or with `json_path`, return or write what
    would be saved.

    Raises:
        ConfigError: the extra that it needs is missing, or Weights & Biases refuses.
    """
    found = dashboard(name, ranks)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        return f"written: {json_path}"
    if wandb_mode(MonitorConfig()) != "online":
        return json.dumps(found, indent=1)
    import wandb
    try:
        entity = entity or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
        saved = workspace_of(found, entity, project).save()
    except Exception as error:  # of the network or the service, of many kinds
        raise ConfigError(f"Weights & Biases did not take the dashboard ({' '.join(str(error).split())[:200]}); check wandb "
                          "login and --entity, or write it with --json FILE") from error
    return f"dashboard: {saved.url}"


def workspace_of(found: dict[str, Any], entity: str, project: str) -> Any:
    """The dashboard as a `wandb_workspaces` workspace that is not saved yet.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError("moedist dashboard needs wandb-workspaces; pip install 'moedist[dashboard]', or write the dashboard "
                          "with --json FILE") from error
    sections = [workspaces.Section(
        name=section["name"], is_open=i < 2,
        panels=[panels.LinePlot(title=panel["title"], x=panel["x"], y=panel["y"]) for panel in section["panels"]])
        for i, section in enumerate(found["sections"])]
    sections.append(workspaces.Section(name="Tables and pictures", panels=[
        panels.MediaBrowser(media_keys=["plan/owners", "plan/ranks", "pictures/widths", "pictures/fisher"])]))
    return workspaces.Workspace(entity=entity, project=project, name=found["name"], sections=sections)
