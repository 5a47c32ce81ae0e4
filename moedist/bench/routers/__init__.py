"""`moedist bench routers`: every router trained from the same weights on the same text, then measured side by side.

`settings` says what is trained, `training` trains and measures one router with one seed by the trainer's own step, `routing`,
`flops`, `text` and `uneven` are the measures, `speeds` times all routers in turn, `keep` is the folder that a run which was
cut off goes on from, `measures` defines every figure in words, `report` and `plots` show them, `run` is the whole.
"""

from moedist.bench.routers.run import bench_routers

__all__ = ["bench_routers"]
