"""From new token ids to text: strings that end it, and text that is shown while it comes."""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

from moedist.data import Tokenizer

SPARE_TOKENS = 8  # beside one a byte: of special tokens, and of the mark that some decoders take off the first token


class Continuation(NamedTuple):
    """One sample: the text after the prompt, its token ids, and why it ended: `stop` (a stop string, which is not in the
    text), `end` (the end-of-text token) or `length`."""

    text: str
    ids: list[int]
    ended: str


class StopStrings:
    """Whether some new token ids spell one of these strings by now. An empty string stops nothing."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self.strings = [s for s in strings if s]
        self._tokenizer = tokenizer
        self._tail = max((len(s.encode("utf-8", "replace")) for s in self.strings), default=0) + SPARE_TOKENS

    def __call__(self, new_ids: Sequence[int]) -> bool:
        if not self.strings:
            return False
        tail = self._tokenizer.decode(new_ids[-self._tail:])
        return any(s in tail for s in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings in it."""
        return text[:min((at for s in self.strings if (at := text.find(s)) >= 0), default=len(text))]

    def settled(self, text: str) -> str:
        """The part of a text in progress that will stay: no unfinished character, no beginning of a stop string."""
        text = self.cut(text).rstrip("\ufffd")
        for s in self.strings:
            for n in range(min(len(s), len(text)), 0, -1):
                if text.endswith(s[:n]):
                    text = text[:-n]
                    break
        return text


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], new_ids: Sequence[int]) -> str:
    """Text of the new ids as it stands after the prompt's: some decoders treat the first token of a text differently."""
    head, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new_ids])
    return whole[len(head):] if whole.startswith(head) else tokenizer.decode(new_ids)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new_ids: Sequence[int], stops: StopStrings) -> Continuation:
    """What came after a prompt, cut where a stop string begins."""
    text = text_after(tokenizer, prompt, new_ids)
    cut = stops.cut(text)
    ended = "stop" if cut != text else "end" if new_ids and new_ids[-1] == tokenizer.eos_id else "length"
    return Continuation(cut, list(new_ids), ended)


class Streamer:
    """Shows the text of one sample as its tokens come, piece by piece.

    Args:
        show: called with each piece.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: StopStrings, show: Callable[[str], None]):
        self._tokenizer, self._prompt, self._stops, self._show = tokenizer, list(prompt), stops, show
        self._ids: list[int] = []
        self._shown = 0

    def __call__(self, index: int, token: int) -> None:
        """As `on_token` of `generate_batch`."""
        self._ids.append(token)
        self._show_to(self._stops.settled(text_after(self._tokenizer, self._prompt, self._ids)))

    def finish(self) -> None:
        """Show what was kept back."""
        self._show_to(self._stops.cut(text_after(self._tokenizer, self._prompt, self._ids)))

    def _show_to(self, text: str) -> None:
        if len(text) > self._shown:
            self._show(text[self._shown:])
            self._shown = len(text)
