"""The tables of `moedist inspect --routing`, from what is also written as JSON."""

from __future__ import annotations

from typing import Any

from moedist.text_table import table

Facts = dict[str, Any]


def report(found: Facts) -> str:
    """Balance, local consistency, affinity."""
    head = f"{found['run']} step {found['step']}, router {found['router']}: {found['tokens']:,} tokens of the validation split"
    blocks = [head, balance_table(found)]
    if found["mean"]["segments"]:
        blocks.append(consistency_table(found))
    if found["affinity"]:
        blocks.append(affinity_table(found["affinity"]))
    return "\n\n".join(blocks)


def balance_table(found: Facts) -> str:
    """One line a layer."""
    rows = [[layer["layer"], layer["experts"], f"{layer['experts_a_token']:.2f}", _number(layer["load_imbalance"]),
             _number(layer["load_cv"]), f"{layer['utilisation']:.3f}", f"{layer['unused_experts']:.0f}",
             _number(layer["router_entropy"])] for layer in found["layers"]]
    mean = found["mean"]
    rows.append(["mean", "", f"{mean['experts_a_token']:.2f}", _number(mean["load_imbalance"]), _number(mean["load_cv"]),
                 f"{mean['utilisation']:.3f}", f"{mean['unused_experts']:.1f}", _number(mean["router_entropy"])])
    return table(["layer", "experts", "a token", "load max/mean", "load cv", "utilisation", "unused", "router entropy"], rows)


def consistency_table(found: Facts) -> str:
    """A line for each layer and length of segments, then the means."""
    rows = [[name, *_consistency(segment)]
            for name, of in [*((layer["layer"], layer) for layer in found["layers"]), ("mean", found["mean"])]
            for segment in of["segments"]]
    caches = [f"SCH {cache['size']:.0f} (static)" for cache in found["mean"]["segments"][0]["caches"]]
    lines = table(["layer", "segment", "SRP", "by frequency", "experts over a token's", *caches], rows)
    return (f"{lines}\nSRP: F1 of the best experts for a whole segment; by frequency: if tokens had nothing to do with each "
            "other.\nSCH: hits of a cache of so many experts that knows a segment ahead; static: of the most frequent ones.")


def affinity_table(pairs: list[Facts]) -> str:
    """One line a pair of layers."""
    rows = [[f"{p['layer']} -> {p['next']}", f"{p['mutual_information']:.3f}", f"{p['bias']:.3f}", f"{p['normalised']:.3f}",
             f"{p['top']:.3f}", f"{p['chance']:.3f}"] for p in pairs]
    return table(["layers", "mutual information, bits", "of them by chance", "of the next layer's", "likeliest next expert",
                  "without knowing"], rows)


def _consistency(segment: Facts) -> list[str]:
    return [f"{segment['m']:.0f}", f"{segment['srp']:.3f}", f"{segment['srp_by_frequency']:.3f}",
            f"{segment['size_ratio']:.2f}", *(f"{c['sch']:.3f} ({c['most_frequent']:.3f})" for c in segment["caches"])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
