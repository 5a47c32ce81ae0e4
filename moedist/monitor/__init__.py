"""What a run says while it goes on: metrics, JSONL, Weights & Biases, alerts, a progress display."""

from moedist.monitor.alerts import Alert, Alerts
from moedist.monitor.balance import (LoadHistory, RoutingMemory, chosen_pairs, expert_utilisation, load_balance, load_metrics,
                                     shared_pairs, spread_evenly)
from moedist.monitor.display import spoken
from moedist.monitor.metrics import METRICS, declaration
from moedist.monitor.peak import measured_peak
from moedist.monitor.recorder import Recorder
from moedist.monitor.traffic import traffic_metrics, traffic_sums
from moedist.monitor.window import RankSums, gather_sums, memory_held, rank_metrics

__all__ = ["Alert", "Alerts", "LoadHistory", "METRICS", "RankSums", "Recorder", "RoutingMemory", "chosen_pairs", "declaration",
           "expert_utilisation", "gather_sums", "load_balance", "load_metrics", "measured_peak", "memory_held", "rank_metrics",
           "shared_pairs", "spoken", "spread_evenly", "traffic_metrics", "traffic_sums"]
