"""What was found of links, judged and put in words: plain data, no communication."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from typing import Optional, Sequence

UNEVEN = 2.0  # times, from which on the slower direction of a link is told
WAYS = "moedist probe CONFIG --links measures all links, world.link_test=false starts without a test"


@dataclass(frozen=True)
class Wrong:
    """Bytes that arrived other than they were sent."""

    dtype: str
    nbytes: int
    count: int
    first: int


@dataclass
class LinkFacts:
    """One direction of a link, as the receiving rank saw it.

    Attributes:
        source, target: ranks; of_source, of_target: what people know them by.
        seconds: bytes of an exchange -> seconds of one, an entry a round.
        checked: bytes that were compared with what was sent; wrong: those that differed.
    """

    source: int
    target: int
    of_source: str
    of_target: str
    seconds: dict[int, list[float]] = field(default_factory=dict)
    checked: int = 0
    wrong: list[Wrong] = field(default_factory=list)

    @property
    def latency_s(self) -> Optional[float]:
        """Of the smallest exchange; None where none was timed."""
        return statistics.median(self.seconds[min(self.seconds)]) if self.seconds else None

    @property
    def bytes_per_s(self) -> Optional[float]:
        """Of the largest exchange, with its latency in it."""
        return max(self.seconds) / statistics.median(self.seconds[max(self.seconds)]) if self.seconds else None

    @property
    def wrong_count(self) -> int:
        return sum(w.count for w in self.wrong)


def describe_wrong(facts: LinkFacts) -> str:
    """One line for a direction on which bytes changed."""
    worst = max(facts.wrong, key=lambda w: w.count / w.nbytes)
    return (f"{facts.of_source} -> {facts.of_target}: of {facts.checked:,} bytes {facts.wrong_count:,} arrived other than "
            f"they were sent ({worst.dtype}: {worst.count:,} of {worst.nbytes:,}, the first at byte {worst.first:,})")


def wrong_text(broken: Sequence[LinkFacts]) -> str:
    """What to say, and do, where links change bytes."""
    return (f"rows are changed on their way: {'; '.join(map(describe_wrong, broken))}; training on would give wrong results "
            "without a word: leave that host out, or take another network (world.interface, MOEDIST_IFNAME) or transport "
            f"(world.transport), and have adapter, cable and memory tested; {WAYS}")


def stuck_text(source: str, target: str, nbytes: int, smaller: int, why: str) -> str:
    """What to say, and do, where rows do not arrive. `smaller`: bytes of an exchange that did; 0: none did."""
    hint = (f"; {smaller:,} bytes did, so see that large packets pass: the same MTU on both hosts and all switches between "
            "(ip link)") if smaller else ""
    return (f"{nbytes:,} bytes {source} -> {target} did not arrive ({why}){hint}; look at that link and the firewalls on it, "
            f"or take another network (world.interface, MOEDIST_IFNAME); {WAYS}")


def uneven_links(facts: Sequence[LinkFacts]) -> list[str]:
    """One line for every link that is much slower one way: by more than `UNEVEN` in the median, and in every round, so that
    it is not the doing of other work."""
    by_ranks = {(f.source, f.target): f for f in facts}
    found = []
    for (source, target), there in by_ranks.items():
        back = by_ranks.get((target, source))
        if source > target or back is None or not (there.seconds and back.seconds):
            continue
        slow, quick = sorted((there, back), key=lambda f: f.bytes_per_s)
        nbytes = max(slow.seconds)
        if quick.bytes_per_s > UNEVEN * slow.bytes_per_s and min(slow.seconds[nbytes]) > max(quick.seconds[nbytes]):
            found.append(f"{slow.of_source} -> {slow.of_target} carries {megabytes(slow)} MB/s, the other way "
                         f"{megabytes(quick)} ({quick.bytes_per_s / slow.bytes_per_s:.1f} times as much): every exchange "
                         "waits for the slower one; look at the adapters' negotiated speed and duplex, at rate limits, and at what "
                         "else sends there")
    return found


def megabytes(facts: LinkFacts) -> str:
    """Its speed, see `speed_text`."""
    return speed_text(facts.bytes_per_s)


def speed_text(bytes_per_s: float) -> str:
    """MB/s, with digits after the point where they are few."""
    value = bytes_per_s / 1e6
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def facts_to_json(facts: Sequence[LinkFacts]) -> str:
    """A list with one object for every direction of a link: the attributes of `LinkFacts`, latency and speed."""
    return json.dumps([{**dataclasses.asdict(f), "latency_s": f.latency_s, "bytes_per_s": f.bytes_per_s} for f in facts],
                      indent=1)
