"""Stop strings and streaming: bytes as tokens, characters of several of them, strings that nearly stop a text."""

import pytest

from moedist.data import Tokenizer
from moedist.decoding.text import StopStrings, Streamer, continuation

BYTES = Tokenizer.byte()


def tokens(text):
    return list(text.encode())


def test_a_text_ends_where_a_stop_string_begins():
    stops = StopStrings(BYTES, ["\n\n", "END", ""])
    assert [stops(tokens("a\nEN")[:n]) for n in range(5)] == [False] * 5
    assert stops(tokens("x" * 50 + "END")) and stops(tokens("a\n\n"))
    assert continuation(BYTES, tokens("p"), tokens("abEND"), stops)[::2] == ("ab", "stop")
    assert continuation(BYTES, tokens("pE"), tokens("ND"), stops)[::2] == ("ND", "length"), "prompts stop nothing"
    assert continuation(BYTES, tokens("p"), [*tokens("ab"), BYTES.eos_id], stops)[::2] == ("ab", "end")
    assert not StopStrings(BYTES, [""])(tokens("ab"))


@pytest.mark.parametrize("text, stops, pieces", [
    ("aüb€", [], ["a", "ü", "b", "€"]), ("a\n\nb", ["\n\n"], ["a"]), ("a\nb", ["\n\n"], ["a", "\nb"]),
    ("aE", ["END"], ["a", "E"]), ("ab\xff", [], ["a", "b", "ÿ"])])
def test_pieces_that_are_shown_stay(text, stops, pieces):
    shown = []
    stream = Streamer(BYTES, tokens("p"), StopStrings(BYTES, stops), shown.append)
    for token in tokens(text):
        stream(0, token)
    stream.finish()
    assert shown == pieces
    assert "".join(shown) == continuation(BYTES, tokens("p"), tokens(text), StopStrings(BYTES, stops)).text


def test_broken_characters_are_shown_in_the_end():
    shown = []
    stream = Streamer(BYTES, tokens("p"), StopStrings(BYTES, []), shown.append)
    for token in [97, 0xC3, BYTES.eos_id]:
        stream(0, token)
    stream.finish()
    assert shown == ["a", "\ufffd"]
