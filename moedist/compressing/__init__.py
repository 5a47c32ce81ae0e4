"""`moedist compress`: a checkpoint made smaller without training, and how methods compare on it."""

from moedist.compressing.offline import compress_run
from moedist.compressing.sweep import sweep_run

__all__ = ["compress_run", "sweep_run"]
