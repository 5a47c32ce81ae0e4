"""What is said of links."""

import json

import pytest

from moedist.links.facts import LinkFacts, Wrong, facts_to_json, stuck_text, uneven_links, wrong_text


def both_ways(there, back):
    """Facts of a link, from seconds of 1 MB."""
    return [LinkFacts(0, 1, "rank 0 on a", "rank 1 on b", {1000: [1e-3], 1_000_000: there}),
            LinkFacts(1, 0, "rank 1 on b", "rank 0 on a", {1000: [1e-3], 1_000_000: back})]


def test_a_slow_direction_is_named():
    facts = both_ways([0.01, 0.011, 0.012], [0.1, 0.09, 0.1])
    assert facts[0].bytes_per_s == pytest.approx(1e6 / 0.011) and facts[0].latency_s == 1e-3
    (line,) = uneven_links(facts)
    assert line.startswith("rank 1 on b -> rank 0 on a carries 10 MB/s, the other way 91 (9.1 times as much)")
    assert uneven_links(facts[::-1]) == [line]


@pytest.mark.parametrize("there, back", [([0.01] * 3, [0.019] * 3),  # not by enough
                                         ([0.01, 0.01, 0.2], [0.1, 0.1, 0.1])])  # a round says otherwise
def test_noise_is_not(there, back):
    assert not uneven_links(both_ways(there, back))


def test_one_direction_alone_is_not_judged():
    assert not uneven_links(both_ways([0.01], [0.1])[:1])


def test_wrong_bytes_are_told_with_where_and_what():
    facts = both_ways([0.01], [0.01])
    facts[0].checked, facts[0].wrong = 8192, [Wrong("float32", 4096, 1, 9), Wrong("int8", 4096, 3, 17)]
    text = wrong_text(facts[:1])
    assert ("rank 0 on a -> rank 1 on b: of 8,192 bytes 4 arrived other than they were sent (int8: 3 of 4,096, the first at "
            "byte 17)") in text and "world.interface" in text
    (told,) = json.loads(facts_to_json(facts[:1]))
    assert told["source"] == 0 and told["wrong"][1]["first"] == 17 and told["bytes_per_s"] == 1e8


def test_large_packets_that_do_not_pass_are_thought_of():
    assert "the same MTU" in stuck_text("a", "b", 2**18, 4096, "why") and "MTU" not in stuck_text("a", "b", 4096, 0, "")
