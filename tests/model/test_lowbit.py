"""The bank of experts in few bits: what it computes, stores and refuses."""

import pytest
import torch

from moedist.compress import Compressed, LowBit
from moedist.errors import CompressError
from moedist.model import ExpertForm, build_bank
from moedist.model.forms import forms_by_expert, tensors_of
from moedist.model.lowbit import ALIGNMENT, LowBitBank
from moedist.model.lowbit_ffn import BLOCK_VALUES, product
from tests.model.expert_forms import expert_of, fill, forms_of, low_expert


def bank_of(experts: dict[int, Compressed], activation: str = "swiglu", width: int = 12) -> LowBitBank:
    bank = build_bank(3, list(experts), list(forms_of(experts).values()), width, activation)
    assert isinstance(bank, LowBitBank)
    fill(bank, experts)
    return bank


def without(expert: Compressed) -> Compressed:
    """The same without compensators."""
    return Compressed(expert.hidden, expert.neurons, {p: LowBit(m.weight, m.transposed) for p, m in expert.parts.items()})


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_every_row_goes_through_its_expert_restored_or_not(activation, dtype, close):
    experts = {e: expert_of("low", hidden, 12, rank, activation == "swiglu", seed=e)
               for e, (hidden, rank) in enumerate([(9, 2), (16, 1), (5, 3), (7, 0)])}
    bank, counts = bank_of(experts, activation), [5, 0, 4, 3]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    flags = torch.rand(12, generator=generator) < 0.5
    flags[:5] = torch.tensor([True, False, True, False, False])
    flags[9:] = True
    for restored in (None, flags, torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)):
        with torch.no_grad():
            found = bank(x.to(dtype), counts, restored_R=restored)
        for i in range(12):
            e = 0 if i < 5 else 2 if i < 9 else 3
            expert = experts[e] if restored is None or restored[i] else without(experts[e])
            parts = {part: matrix.dense(torch.float64) for part, matrix in expert.parts.items()}
            wanted = type(expert.dense()).of(parts)(x[i:i + 1])
            torch.testing.assert_close(found[i:i + 1].double(), wanted, rtol=close, atol=close)


def test_blocks_change_nothing():
    expert = low_expert(3, 40, 2**12, 0, False, torch.Generator().manual_seed(0))
    weight = expert.parts["up"].weight
    assert weight.shape[0] * weight.shape[1] > 2 * BLOCK_VALUES
    x = torch.randn(3, 2**12, dtype=torch.float64)
    torch.testing.assert_close(product(x, weight), x @ weight.dense(torch.float64).t(), rtol=1e-12, atol=1e-12)


def test_stored_bytes_are_packed_and_named():
    experts = {e: expert_of(f"low{bits}", 8, 12, 2, seed=e, before=11) for e, bits in enumerate((2, 3, 4, 8))}
    bank = bank_of(experts)
    names = bank.named_weights()
    assert names["layers.3.experts.1.w1.q3g4"].shape == (8, 5) and names["layers.3.experts.1.w1.q3g4"].dtype == torch.uint8
    assert names["layers.3.experts.2.w2.scales"].dtype == torch.float16 and "layers.3.experts.2.w2.zeros" not in names
    shapes = {name: tuple(t.shape) for name, t in {**names, **bank.named_indices()}.items()}
    found = forms_by_expert(dict(reversed(shapes.items())))[3]
    for e, expert in experts.items():
        form = found[e]
        assert form == bank.form_of(e) == ExpertForm.of(expert)
        assert form.is_lowbit and not form.is_dense and form.gated and (form.hidden, form.width) == (8, 12)
        assert form.bytes() == expert.bytes == sum(t.nbytes for t in tensors_of(expert).values()) + 4 * 8
        assert form.numbers == 3 * 8 * 12 + 3 * 2 * 20
        assert bank.stored(e).bytes == expert.bytes
        (flat,) = bank.blocks_of(e, bank.weights())
        assert form.weight_bytes() <= len(flat) < form.weight_bytes() + ALIGNMENT * len(form.tensors)


def test_an_expert_moves_between_banks_as_a_run_of_bytes():
    experts = {e: expert_of("low", 8, 12, 2, seed=e) for e in range(4)}
    whole, part = bank_of(experts), build_bank(3, [2, 3], [ExpertForm.of(experts[e]) for e in (2, 3)], 12, "swiglu")
    for e in (2, 3):
        part.blocks_of(e, part.weights())[0].copy_(whole.blocks_of(e, whole.weights())[0])
        assert all(torch.equal(t, part.named_weights()[n]) for n, t in whole.named_weights().items() if f"experts.{e}." in n)


def test_refusals():
    bank = bank_of({0: expert_of("low", 8, 12, 2)})
    x = torch.randn(2, 12, requires_grad=True)
    with pytest.raises(CompressError, match="no backward pass"):
        bank(x, [2])
    with pytest.raises(ValueError, match="some are in few bits and some not"):
        build_bank(0, [0, 1], [ExpertForm.of(expert_of("low", 8, 12)), ExpertForm.dense(12, 8, True)], 12, "swiglu")
    shapes = {name: tuple(t.shape) for name, t in tensors_of(expert_of("low", 8, 12)).items() if not name.startswith("w2")}
    with pytest.raises(ValueError, match="some matrices in few bits and some not"):
        ExpertForm.from_shapes({**shapes, "w2": (8, 12)})
    with pytest.raises(ValueError, match="no use for"):
        ExpertForm.from_shapes({**shapes, "w2.q2g4": (12, 2), "w2.scales": (12, 2), "w2.other": (1,)})
