"""Which replicas have served a prompt's beginning lately, and so may still have it in their prefix caches.

Rules:
- A prompt's beginning is known at marks that lie further and further apart (`MARK_RATIO`): some forty of the longest prompt,
  and what two prompts share is found but for a fifth of it at most.
- A mark is a hash of all that stands before it, salted: prompts of two salts never share one. A wrong hit costs a detour.
- A replica is believed to have a beginning until it was sent as many new tokens as its KV pool holds: the cache is evicted
  in the order of last use. A replica that went away has nothing when it comes back.
- Bounded: `max_marks` of those used last, at `MAX_HOMES` replicas each.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

MARK_RATIO = 1.25
MARK_BYTES = 256
"""Up to the first mark: four KV blocks of text. Shorter prompts have none, for they are computed in no time."""

MAX_HOMES = 4
"""Replicas that are remembered of a mark: those that served it last."""

MAX_MARKS = 1 << 16


class Mark(NamedTuple):
    """A place in a prompt."""

    key: int
    """Of all that stands before it."""

    num_tokens: int
    """Those that stand before it."""


def mark_places(num: int) -> list[int]:
    """Return the places among `num` equal parts, from 1 on, after which there is a mark."""
    places, place = [], 1
    while place <= num:
        places.append(place)
        place = max(place + 1, int(place * MARK_RATIO))
    return places


def prompt_marks(pieces: Iterable[bytes], *, salt: str, bytes_per_token: int) -> list[Mark]:
    """Return the marks of a prompt from its text, the first one first.

    Args:
        salt: Keeps apart whose prefix caches are apart.
        bytes_per_token: Of the text, about.
    """
    text = b"".join(pieces)
    hasher, marks, start = blake2b(salt.encode(), digest_size=8), [], 0
    for place in mark_places(len(text) // MARK_BYTES):
        end = place * MARK_BYTES
        hasher.update(memoryview(text)[start:end])
        start = end
        marks.append(Mark(int.from_bytes(hasher.copy().digest()), end // bytes_per_token))
    return marks


class PrefixHomes:
    """Replicas by what they have served."""

    def __init__(self, max_marks: int = MAX_MARKS) -> None:
        self._max_marks = max_marks
        self._lives: dict[str, int] = {}
        """Number of each replica's life: what is said of another life of it counts no more."""

        self._names: dict[int, str] = {}
        self._num_lives = 0
        self._served: dict[int, int] = {}
        """New tokens that each was sent."""

        self._pools: dict[int, int] = {}
        """Tokens of each one's KV pool, where that is known."""

        self._homes: OrderedDict[int, dict[int, int]] = OrderedDict()
        """By mark: lives, and what they had been sent when they served it last."""

    def up(self, replica: str) -> None:
        """A replica has come up, with an empty cache."""
        assert replica not in self._lives, f"{replica} is up already"
        self._num_lives += 1
        life = self._lives[replica] = self._num_lives
        self._names[life], self._served[life] = replica, 0

    def down(self, replica: str) -> None:
        """A replica is gone."""
        life = self._lives.pop(replica)
        del self._names[life], self._served[life]
        self._pools.pop(life, None)

    def set_pool(self, replica: str, num_tokens: int) -> None:
        """Say how many tokens a replica's KV pool holds."""
        self._pools[self._lives[replica]] = num_tokens

    def cached(self, marks: Sequence[Mark]) -> dict[str, int]:
        """Return how many of a prompt's first tokens replicas are believed to have; nothing of those that have none."""
        found: dict[str, int] = {}
        for mark in reversed(marks):
            for life, served in self._homes.get(mark.key, {}).items():
                name = self._names.get(life)
                if name is None or name in found:
                    continue
                pool = self._pools.get(life)
                if pool is None or self._served[life] - served <= pool:
                    found[name] = mark.num_tokens
        return found

    def serve(self, marks: Sequence[Mark], replica: str, num_new_tokens: int) -> None:
        """A prompt was sent to a replica, which has all but `num_new_tokens` of it."""
        life = self._lives[replica]
        self._served[life] += num_new_tokens
        for mark in marks:
            homes = self._homes.pop(mark.key, None) or {}
            homes.pop(life, None)
            homes[life] = self._served[life]
            if len(homes) > MAX_HOMES:
                del homes[next(iter(homes))]
            self._homes[mark.key] = homes
        while len(self._homes) > self._max_marks:
            self._homes.popitem(last=False)

    def check(self) -> None:
        """Assert what always holds; O(marks)."""
        assert len(self._homes) <= self._max_marks, f"{len(self._homes)} marks of {self._max_marks}"
        assert set(self._names) == set(self._served) == set(self._lives.values()), "replicas are counted differently"
        assert set(self._pools) <= set(self._names), "a pool of nobody"
        for homes in self._homes.values():
            assert 0 < len(homes) <= MAX_HOMES, f"{len(homes)} replicas of a mark"
            assert all(served <= self._served.get(life, served) for life, served in homes.items()), "served in future"
