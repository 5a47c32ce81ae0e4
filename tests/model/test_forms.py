"""Forms: what is stored, in what order, and back again from a checkpoint's names and shapes."""

import pytest
import torch

from moedist.compress import ColumnsRows, Interpolated, TwoFactors
from moedist.model.forms import ExpertForm, expert_prefix, forms_by_expert, indices_of, named, tensors_of
from tests.model.expert_forms import KINDS, expert_of


def test_a_form_by_hand():
    form = ExpertForm.of(expert_of("interp dense cur", hidden=5, width=4, rank=2, before=9))
    assert form.tensors == (("w1.rest", (3, 2)), ("w1.basis", (2, 4)), ("w3", (5, 4)),
                            ("w2.columns", (5, 2)), ("w2.core", (2, 2)), ("w2.rows", (2, 4)))
    assert form.indices == (("neurons", 5), ("w1.kept", 2), ("w2.column_ids", 2), ("w2.row_ids", 2))
    assert (form.hidden, form.width, form.numbers, form.index_numbers) == (5, 4, 6 + 8 + 20 + 10 + 4 + 8, 11)
    assert form.flops_per_row == 2 * 56 and form.bytes() == 4 * 56 + 4 * 11 and form.bytes(2) == 2 * 56 + 4 * 11
    assert form.gated and not form.is_dense
    assert form.matrices() == {"w1": ("w1.rest", "w1.basis"), "w3": ("w3",), "w2": ("w2.columns", "w2.core", "w2.rows")}


def test_dense_forms():
    form = ExpertForm.dense(4, 6, gated=False)
    assert form == ExpertForm.of(expert_of("dense", 6, 4, gated=False)) == ExpertForm((("w1", (6, 4)), ("w2", (6, 4))))
    assert form.is_dense and not form.gated and (form.hidden, form.width, form.index_numbers) == (6, 4, 0)
    narrowed = ExpertForm.of(expert_of("dense", 6, 4, before=8))
    assert narrowed.is_dense and narrowed.indices == (("neurons", 6),)
    assert len({form, narrowed, ExpertForm.dense(4, 6, False)}) == 2  # hashable, equal by value


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kinds", [*KINDS, "two interp dense", "dense cur interp"])
def test_stored_gives_back_the_expert(kinds, gated):
    before = expert_of(kinds, 7, 4, gated=gated, before=11)
    form = ExpertForm.of(before)
    flat = torch.cat([tensors_of(before)[name].flatten() for name, _ in form.tensors])
    index = torch.cat([indices_of(before)[name] for name, _ in form.indices])
    after = form.stored(form.split([flat]), form.split_indices(index), 11)
    assert (after.hidden, after.bytes, form.bytes(8)) == (11, before.bytes, before.bytes)
    assert torch.equal(after.neurons, before.neurons)
    for part, matrix in before.parts.items():
        assert type(after.parts[part]) is type(matrix)
        assert torch.equal(after.parts[part].dense(), matrix.dense())
    view = next(iter(form.split([flat]).values()))
    view.fill_(7)
    assert (flat[:view.numel()] == 7).all(), "views, not copies"


def test_numbers_in_several_blocks_and_empty_tensors():
    form = ExpertForm.of(expert_of("interp two dense", hidden=2, width=3, rank=2))  # all rows kept: rest is [0, 2]
    assert form.tensors[0] == ("w1.rest", (0, 2)) and form.hidden == 2
    whole = torch.arange(form.numbers)
    cut = sum(shape[0] * shape[1] for name, shape in form.tensors if not name.startswith("w2"))
    for (name, a), b in zip(form.split([whole]).items(), form.split([whole[:cut], whole[cut:]]).values()):
        assert torch.equal(a, b) and a.shape == dict(form.tensors)[name]


def test_forms_from_the_names_of_a_checkpoint():
    experts = {(0, 3): expert_of("interp", 5, 4, before=9), (0, 12): expert_of("dense", 6, 4),
               (2, 0): expert_of("cur", 3, 4)}
    shapes = {"embedding.weight": (20, 4), "layers.0.ffn.router.weight": (3, 4),
              "optimizer.exp_avg.layers.0.experts.3.w3": (1,)}
    for (layer, e), expert in experts.items():
        values = {**tensors_of(expert), **indices_of(expert)}
        shapes |= {expert_prefix(layer, e) + name: values[name].shape for name in reversed(values)}
    assert forms_by_expert(shapes) == {0: {e: ExpertForm.of(experts[0, e]) for e in (3, 12)},
                                       2: {0: ExpertForm.of(experts[2, 0])}}


def test_names_that_make_no_expert_are_refused():
    with pytest.raises(ValueError, match="no form of a matrix has the tensors .*'w2.left'"):
        ExpertForm.from_shapes({"w1": (2, 3), "w2.left": (2, 1)})
    with pytest.raises(ValueError, match=r"no use for \['w4'\]"):
        ExpertForm.from_shapes({"w1": (2, 3), "w2": (2, 3), "w4": (2, 3)})


def test_moments_take_the_same_names():
    expert = expert_of("interp two cur", 6, 4)
    moments = expert.map_moments(*(torch.rand(6, 4, dtype=torch.float64) for _ in range(3)), second=True)
    found = named(expert, moments)
    assert {name: tuple(t.shape) for name, t in found.items()} == dict(ExpertForm.of(expert).tensors)
    assert [type(expert.parts[part]) for part in expert.parts] == [Interpolated, TwoFactors, ColumnsRows]
