"""`moedist compress`: a checkpoint made smaller without training, and how methods compare on it."""

from moedist.compressing.dense import dense_run
from moedist.compressing.heal import heal_run
from moedist.compressing.offline import compress_run
from moedist.compressing.sweep import sweep_run

__all__ = ["compress_run", "dense_run", "heal_run", "sweep_run"]
