"""The tables of `moedist inspect`, from what is also written as JSON."""

from __future__ import annotations

from typing import Any, Iterable

from moedist.neurons.facts import OVERLAPS
from moedist.text_table import table

WORDS, DIMENSIONS = 3, 2  # of each neuron; the JSON has more
LONGEST = 16  # characters of a token
Facts = dict[str, Any]


def report(found: Facts, details: bool, top: int) -> str:
    """Experts, overlaps, and neurons.

    Args:
        details: tell neurons of all experts that have them; else of the one with most Fisher mass in each layer.
        top: dropped neurons told of each; of kept ones, those that are told in full.
    """
    blocks = [_head(found), experts_table(found["experts"]), overlap_table(found["overlap"])]
    told = [e for e in found["experts"] if "neurons" in e]
    for e in told if details else _heaviest(told):
        blocks.append(expert_block(e, top))
    if not details and len(told) > len(_heaviest(told)):
        blocks.append("Neurons of the expert with most Fisher mass in each layer; for others: --layer I --expert E, or --json "
                      "PATH for all.")
    return "\n\n".join(blocks)


def experts_table(experts: list[Facts]) -> str:
    """One line an expert."""
    rows = [[e["layer"], e["expert"], f"{e['hidden']} of {e['hidden_before']}", _percent(e["fisher_kept"]),
             _percent(e["frequency"]), "" if e["router_weight"] is None else f"{e['router_weight']:.3f}",
             f"{e['bytes'] / 1024:,.1f}", e["form"]] for e in experts]
    return table(["layer", "expert", "neurons", "Fisher mass kept", "of tokens", "mean weight", "KiB", "form"], rows)


def overlap_table(overlaps: list[Facts]) -> str:
    """What experts of a layer have in common, with what chance would give beside it."""
    rows = []
    for o in overlaps:
        if o["mean"] is not None:
            a, b = o["most"]
            rows.append([o["layer"], OVERLAPS[o["what"]], f"{o['size']} of {o['of']}", f"{o['mean']:.3f}",
                         f"{o['chance']:.3f} +- {o['chance_sd']:.3f}", f"{o['matrix'][a][b]:.3f} ({a} and {b})"])
    if not rows:
        return "one expert a layer: nothing to compare"
    return table(["layer", "overlap of", "taken", "mean of pairs", "by chance (one pair)", "most alike"], rows)


def expert_block(e: Facts, top: int) -> str:
    """The neurons of one expert, and those it has lost."""
    kept = f", {_percent(e['fisher_kept'])} of Fisher mass kept" if e["fisher_kept"] is not None and e["dropped"] else ""
    lines = [f"layer {e['layer']}, expert {e['expert']}: {e['hidden']} of {e['hidden_before']} neurons{kept}; "
             f"{_percent(e['frequency'])} of tokens"]
    some = [n for n in e["neurons"] if "raises" in n]
    lines.append(_indented(table(["neuron", "Fisher", "raises", "lowers", "reads dimensions", "writes dimensions"], [
        [n["neuron"], _percent(n["fisher_share"]), _tokens(n["raises"]), _tokens(n["lowers"]), _dimensions(n["reads"]),
         _dimensions(n["writes"])] for n in some])))
    examples = [[n["neuron"], f"{t['activation']:+.3g}", _marked(t)] for n in some for t in n["tokens"]]
    if examples:
        lines.append(_indented(table(["neuron", "activation", "on token"], examples)))
    if e["dropped"]:
        there = {n["neuron"] for n in e["neurons"]}
        lines.append(_indented(table(["dropped", "at step", "Fisher", "restored", "kept ones in its place"], [
            [d["neuron"], d["step"], _percent(d["fisher_share"]), _percent(d.get("explained")), _stand_ins(d, there)]
            for d in e["dropped"][:top]])))
    return "\n".join(lines)


def _head(found: Facts) -> str:
    done = "; ".join(f"{c['method']} at step {c['step']}, {_percent(c['ratio'])} removed" for c in found["compressions"])
    return f"{found['run']} step {found['step']}, on {found['tokens']:,} validation tokens; compressed: {done or 'never'}"


def _heaviest(experts: list[Facts]) -> list[Facts]:
    best: dict[int, Facts] = {}
    for e in experts:
        if e["layer"] not in best or e["fisher"] > best[e["layer"]]["fisher"]:
            best[e["layer"]] = e
    return list(best.values())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _tokens(words: Iterable[Facts]) -> str:
    return " ".join(f"'{_shown(w['token'][:LONGEST])}'" for w in list(words)[:WORDS])


def _dimensions(shares: Iterable[Facts]) -> str:
    return ", ".join(f"d{s['dimension']} ({100 * s['share']:.0f} %)" for s in list(shares)[:DIMENSIONS])


def _stand_ins(d: Facts, there: set[int]) -> str:
    return ", ".join(f"n{s['neuron']} ({s['weight']:+.2f}{'' if s['neuron'] in there else ', dropped since'})"
                     for s in d.get("stand_ins", ())) or "nobody"


def _marked(example: Facts) -> str:
    left, right = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
    return f"{_shown(example['before'])}{left}{_shown(example['token'])}{right}{_shown(example['after'])}"


def _shown(text: str) -> str:
    """On one line: characters that are not printed are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
