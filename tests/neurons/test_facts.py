"""What is told of an expert and printed, by hand."""

import numpy as np
import pytest
import torch

from moedist.compress import Calibration, Expert
from moedist.data import Tokenizer
from moedist.model import ExpertForm
from moedist.neurons.facts import Surroundings, Words, curve_facts, dropped_facts, expert_facts, form_words, neuron_facts
from moedist.neurons.record import NeuronRecord
from moedist.neurons.report import expert_block, experts_table, overlap_table
from moedist.neurons.tokens import TopTokens

TEXT = "one cat, two cats"


def calibration(*fisher: float) -> Calibration:
    return Calibration(torch.tensor(50.0).double(), torch.tensor(20.0).double(), fisher=torch.tensor(fisher))


def record(neurons, fisher, kept, **more) -> NeuronRecord:
    ids = np.array(neurons, np.int32)
    return NeuronRecord(ids, np.array(fisher, np.float32), np.array(kept, np.int32), np.setdiff1d(ids, kept), **more)


FIRST = record([0, 1, 2, 3], [6, 1, 2, 1], [0, 2, 3], stand_in=np.array([[2, 0]], np.int32),
               stand_in_weight=np.array([[0.5, -0.25]], np.float32), explained=np.array([0.75], np.float32))
SECOND = record([0, 2, 3], [5, 0, 5], [0, 3])
HISTORY = [(10, FIRST), (20, SECOND)]


@pytest.fixture
def words():
    tokenizer = Tokenizer.byte()
    return Words(tokenizer, np.array([*tokenizer.encode(TEXT), tokenizer.eos_id], np.uint16), 18)


def told(words):
    """An expert of neurons 0 and 3 whose second is worth more, reads dimension 1 and raises "t" over "c"."""
    expert = Expert(None, torch.tensor([[1.0, 0], [0, 1.0]]), torch.tensor([[0, 1.0], [1.0, 0]]))
    letters = [words.used.tolist().index(ord(c)) for c in "tc"]
    head = torch.zeros(len(words.used), 2)
    head[letters, 0] = torch.tensor([1.0, -1.0])
    top = TopTokens(1, 3)
    top.add(torch.tensor([[0.5], [-4.0]]), torch.tensor([2, 6]))
    now = calibration(1.0, 3.0)
    return neuron_facts(expert, [0, 3], now, torch.tensor([1]), top, Surroundings(torch.ones(2), torch.ones(2), head), words)


def test_neurons_go_by_their_ids_and_come_by_score(words):
    first, second = told(words)
    assert (first["neuron"], first["fisher_share"]) == (3, 0.75) and second == {"neuron": 0, "fisher_share": 0.25}
    assert first["reads"][0] == {"dimension": 1, "share": 1.0} and first["writes"][0] == {"dimension": 0, "share": 1.0}
    assert first["raises"][0]["token"] == "t" and first["lowers"][0]["token"] == "c"
    assert first["raises"][0]["deviations"] == -first["lowers"][0]["deviations"] > 1
    assert first["tokens"] == [{"activation": -4.0, "before": "one ca", "token": "t", "after": ", two cats"},
                               {"activation": 0.5, "before": "on", "token": "e", "after": " cat, two cats"}]


def test_words_have_names(words):
    assert words.token(ord("t")) == "t" and words.token(256) == "<<|endoftext|>>"
    assert words.token(0xC3) == "<Ã>"  # half a character
    assert words.used.tolist() == sorted({*TEXT.encode(), 256})


def test_an_expert_on_one_line():
    form = ExpertForm.dense(8, 2, gated=True)
    told = expert_facts(1, 5, form, 4, calibration(1.0, 3.0), 200, HISTORY, 4)
    assert told["fisher_kept"] == pytest.approx(0.9 * 1.0) and told["compressions"] == [10, 20]
    assert (told["frequency"], told["router_weight"], told["bytes"]) == (0.25, 0.4, 3 * 2 * 8 * 4)
    assert expert_facts(1, 5, ExpertForm.dense(8, 4, True), 4, calibration(1.0, 3.0), 200, [], 4)["fisher_kept"] == 1
    unknown = expert_facts(1, 5, form, 4, calibration(1.0, 3.0), 200, [], 4)  # compressed, and nobody wrote how
    assert unknown["fisher_kept"] is None
    assert expert_facts(1, 5, form, 4, calibration(1.0, 3.0), 200, [(20, SECOND)], 4)["fisher_kept"] is None  # before?
    no_tokens = record([0, 1, 2, 3], [0, 0, 0, 0], [0, 3])
    assert expert_facts(1, 5, form, 4, calibration(0.0, 0.0), 200, [(20, no_tokens)], 4)["fisher_kept"] is None
    line = experts_table([told, unknown]).splitlines()
    assert "2 of 4" in line[1] and "90.0 %" in line[1] and "25.0 %" in line[1] and "90.0 %" not in line[2]


def test_dropped_neurons_of_all_compressions():
    assert dropped_facts(HISTORY) == [
        {"neuron": 1, "step": 10, "fisher_share": pytest.approx(0.1), "explained": 0.75,
         "stand_ins": [{"neuron": 2, "weight": 0.5}, {"neuron": 0, "weight": -0.25}]},
        {"neuron": 2, "step": 20, "fisher_share": 0.0}]


def test_curves_fall_and_say_what_stayed():
    assert curve_facts([(10, FIRST)], calibration(9.0)) == {"step": 10, "fisher": [6, 2, 1, 1],
                                                            "kept": [True, True, False, True]}
    assert curve_facts([], calibration(1.0, 3.0)) == {"step": None, "fisher": [3, 1], "kept": [True, True]}


def test_forms_in_words():
    assert form_words(ExpertForm.dense(8, 2, True)) == "dense"
    shapes = {"neurons": (5,), "w1.rest": (2, 3), "w1.basis": (3, 8), "w1.kept": (3,), "w3": (5, 8),
              "w2.left": (5, 2), "w2.right": (2, 8)}
    assert form_words(ExpertForm.from_shapes(shapes)) == "rank 3/all/2"


def test_a_block_names_stand_ins_and_those_that_are_gone_too(words):
    told_of = {"layer": 1, "expert": 5, "hidden": 2, "hidden_before": 4, "fisher_kept": 0.9, "frequency": 0.25,
               "neurons": told(words), "dropped": dropped_facts(HISTORY)}
    text = expert_block(told_of, top=5)
    assert "one ca«t», two cats" in text and "2 of 4 neurons, 90.0 % of Fisher mass kept" in text
    assert "n2 (+0.50, dropped since), n0 (-0.25)" in text and "nobody" in text
    assert "n2" not in expert_block({**told_of, "dropped": []}, top=5)
    assert "nobody" not in expert_block(told_of, top=1)  # the neuron of less mass is left out


def test_one_expert_a_layer_has_nothing_to_compare():
    assert "nothing to compare" in overlap_table([{"mean": None}])
