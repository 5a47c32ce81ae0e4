"""The commands by group, one file each: their arguments, and what they call."""

from moedist.commands import benches, experts, hub, ranks, runs, watching

GROUPS = (runs, ranks, experts, watching, hub, benches)

__all__ = ["GROUPS"]
