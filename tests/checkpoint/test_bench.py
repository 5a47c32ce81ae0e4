"""`moedist bench checkpoint` on a small model: all figures, and nothing left behind."""

import json

import moedist.bench.checkpoint as bench


def test_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.CONFIG, "model", {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2,
                                                "expert_hidden": 128})
    figures = bench.bench_checkpoint(2, str(tmp_path), str(tmp_path / "figures.json"))
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert set(figures) == {f"checkpoint.{name}" for name in (
        "async_blocking_fraction", "first_blocking_fraction", "sync_s", "async_blocked_s", "async_s", "mb_per_s", "hash_s", "load_s",
        "step_slowdown_while_writing")}
    assert all(value > 0 for value in figures.values()) and figures["checkpoint.async_blocked_s"] <= figures["checkpoint.async_s"]
    out = capsys.readouterr().out
    assert "checkpoint.async_blocking_fraction" in out and "393,216 of them in experts" in out
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]
