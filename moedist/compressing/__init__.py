"""`moedist compress`: a checkpoint made smaller without training, and how methods compare on it."""

from moedist.compressing.dense import dense_run
from moedist.compressing.heal import heal_run
from moedist.compressing.low_bits import beam_run
from moedist.compressing.low_bits_sweep import low_bits_sweep
from moedist.compressing.offline import compress_run
from moedist.compressing.sweep import sweep_run

__all__ = ["beam_run", "compress_run", "dense_run", "heal_run", "low_bits_sweep", "sweep_run"]
