"""What a run says while it goes on: metrics, JSONL, Weights & Biases, a progress line."""

from moedist.monitor.metrics import METRICS, load_metrics
from moedist.monitor.recorder import Recorder
from moedist.monitor.traffic import traffic_metrics, traffic_sums

__all__ = ["METRICS", "Recorder", "load_metrics", "traffic_metrics", "traffic_sums"]
