"""The layer bench runs, compares the same function, and writes its figures."""

import json
import time

import pytest
import torch

from moedist.bench.compressed import JOINT, WHOLE, bench_compressed, compressed_forms
from moedist.bench.interleave import interleaved_medians
from moedist.bench.layer import SHAPES, _check_agreement, bench_device, bench_layer, build_bench_layer, measure, our_forward
from moedist.errors import MoedistError


def test_measures_every_peer_and_writes_figures(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("deepspeed")
    figures = bench_layer(["tiny"], ["fp32", "bf16"], 2, str(tmp_path / "f.json"))
    assert json.loads((tmp_path / "f.json").read_text()) == figures
    assert {f"layer.tiny.{d}.{f}" for d in ("fp32", "bf16") for f in ("vs_best_peer", "vs_dense")} <= set(figures)
    out = capsys.readouterr().out
    for name in ("transformers eager", "transformers batched_mm", "transformers grouped_mm", "deepspeed"):
        assert name in out
    seconds, left_out = measure("tiny", "fp32", 1)
    assert len(seconds) == 7 and all(v > 0 for v in seconds.values())
    assert all("CUDA" in text for text in left_out)


def test_a_peer_that_computes_something_else_is_refused():
    runs = {"moedist": lambda: torch.ones(1, 10, 4), "other": lambda: 1.1 * torch.ones(1, 10, 4)}
    with pytest.raises(MoedistError, match="other agrees with moedist"):
        _check_agreement(runs, torch.float32)


def test_interleaving_calls_everything_in_turn_and_the_slow_apart():
    calls = []

    def run(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)
        return call

    medians = interleaved_medians({"a": run("a", 0.02), "slow": run("slow", 0.4), "b": run("b", 0.02)}, rounds=3, warmup=1)
    assert calls == ["a", "a", "slow", "slow", "b", "b"] + ["slow"] * 3 + ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert list(medians) == ["a", "slow", "b"] and medians["slow"] >= 0.4


def test_one_that_takes_part_whatever_its_speed():
    calls = []
    runs = {"a": lambda: calls.append("a"), "slow": lambda: (calls.append("slow"), time.sleep(0.02))}
    interleaved_medians(runs, rounds=2, warmup=0, slow_factor=float("inf"))
    assert calls == ["a", "a", "slow", "slow", "a", "slow", "slow", "a"]


def test_compressed_kinds_have_their_share_of_the_numbers():
    for shape in ("coarse", "fine"):
        forms = compressed_forms(SHAPES[shape])
        numbers = {name: sum(form.numbers for form in of_experts) for name, of_experts in forms.items()}
        assert all(0.28 < n / numbers[WHOLE] < 0.32 for name, n in numbers.items() if name != WHOLE), numbers
        assert numbers[JOINT] == numbers[f"{JOINT}, unequal widths"]
        uneven = {form.hidden for form in forms[f"{JOINT}, unequal widths"]}
        assert len(uneven) > 4 and all(width % 8 == 0 < width for width in uneven)
    assert {form.hidden for form in compressed_forms(SHAPES["coarse"])[JOINT]} == {616}


def test_compressed_banks_are_measured(tmp_path, capsys):
    figures = bench_compressed(1, str(tmp_path / "f.json"), "fine")
    assert json.loads((tmp_path / "f.json").read_text()) == figures and list(figures) == ["layer.compressed70.time_ratio"]
    out = capsys.readouterr().out
    assert all(name in out for name in compressed_forms(SHAPES["fine"])) and figures["layer.compressed70.time_ratio"] > 0


@pytest.mark.gpu
def test_layer_on_an_accelerator_equals_the_cpu():
    y = {}
    for device in (torch.device("cpu"), bench_device()):
        shape = SHAPES["tiny"]
        layer = build_bench_layer(shape, torch.float32, device)
        x = torch.randn(1, shape.tokens, shape.width, generator=torch.Generator().manual_seed(0)).to(device)
        x.requires_grad_()
        out = our_forward(layer, shape.tokens, device)(x)
        out.square().sum().backward()
        y[device.type] = [t.detach().cpu() for t in (out, x.grad, layer.bank.w_in.grad, layer.router.weight.grad)]
    for a, b in zip(y["cpu"], y[bench_device().type]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
