"""The commands by group, one file each: their arguments, and what they call."""

from moedist.commands import benches, cluster, experts, hub, ranks, runs, watching

GROUPS = (runs, cluster, ranks, experts, watching, hub, benches)

__all__ = ["GROUPS"]
