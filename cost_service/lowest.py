"""The member with the lowest key, of thousands whose keys rise all the time: a heap that is corrected at its top alone.

Rules:
- What the heap holds of a member is at most its key of now: a key that rises needs no word, one that falls is told (`fell`).
- Of a member one entry counts, the newest. The others are thrown out when they get to the top: if they were corrected, each
  would have to be again after every rise.
- `lowest` corrects entries at the top until one is true, so a rise costs O(log n) once, when it gets there.
- Ties go to the lower name, so that the same history gives the same choice.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Set

ROUNDING = 1e-9
"""Share of a key by which it may fall without a word: sums of floats."""

SPARE_ENTRIES = 64
"""Entries beyond twice the members before outdated ones are thrown out."""


class Lowest:
    """Members by a key that is asked for when it is needed."""

    __slots__ = ("_heap", "_key", "_known", "_members", "members")

    def __init__(self, key: Callable[[str], float]) -> None:
        self._key = key
        self._members: set[str] = set()
        self.members: Set[str] = self._members
        """Who is a member now, to be read: the same object for ever, for loops in which a call is too dear."""
        self._heap: list[tuple[float, str]] = []
        self._known: dict[str, float] = {}
        """The key in each member's newest entry."""

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def add(self, name: str) -> None:
        """Make somebody a member who is none."""
        assert name not in self._members, f"{name!r} is a member already"
        self._members.add(name)
        self._push(name)

    def discard(self, name: str) -> None:
        """Let somebody go, if a member."""
        self._members.discard(name)
        self._known.pop(name, None)
        if not self._members:
            self._heap.clear()

    def fell(self, name: str) -> None:
        """Say that a key may be lower than before."""
        if name in self._members:
            self._push(name)

    def lowest(self) -> tuple[float, str] | None:
        """Return the lowest key and whose it is, or None when there is nobody."""
        while self._heap:
            known, name = self._heap[0]
            if self._known.get(name) != known:
                heapq.heappop(self._heap)
            elif (key := self._key(name)) > known:
                self._known[name] = key
                heapq.heapreplace(self._heap, (key, name))
            else:
                fell = known - key > ROUNDING * abs(known)
                assert not fell, f"the key of {name!r} fell from {known} to {key} without a word"
                return key, name
        return None

    def _push(self, name: str) -> None:
        key = self._key(name)
        if key >= self._known.get(name, math.inf):
            return  # its entry says no more than that
        self._known[name] = key
        heapq.heappush(self._heap, (key, name))
        if len(self._heap) > 2 * len(self._members) + SPARE_ENTRIES:
            self._heap = [(key, member) for member, key in self._known.items()]
            heapq.heapify(self._heap)
