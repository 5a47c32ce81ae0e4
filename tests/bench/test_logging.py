"""`moedist bench logging` on one rank, shortly: what it prints is what it writes."""

import json

from tests.launching import moedist


def test_figures(cache, tmp_path):
    done = moedist(1, cache, "bench", "logging", "--steps", "6", "--log-every", "2", "--json", str(tmp_path / "logging.json"))
    figures = json.loads((tmp_path / "logging.json").read_text())
    assert set(figures) == {f"logging.{name}" for name in ("overhead_fraction", "step_ms", "every_step_ms", "logging_step_ms")}
    assert all(f"{name} {value:.3g}" in done.stdout for name, value in figures.items())
    # of the parts, roughly: a logging step every other step
    both = figures["logging.every_step_ms"] + figures["logging.logging_step_ms"] / 2
    assert 0 < both / figures["logging.step_ms"] < 1 and 0 < figures["logging.overhead_fraction"] < 1
