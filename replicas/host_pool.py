"""Book-keeping of host memory slots that hold the KV blocks of swapped-out requests.

Rules:
- A slot is free or belongs to exactly one request; `free + held == num_slots` after every change.
- A request has at most one saved copy; it covers its blocks from the first one on, the last one may be partly filled.
- Slots are handed out lowest first, so that the same history gives the same slots.
"""

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SavedBlocks:
    """One request's KV in host memory."""

    num_tokens: int
    """Tokens whose KV is valid, counted from the first token."""

    slots: tuple[int, ...]
    """Host slot of the request's i-th block."""


class HostBlockPool:
    """A bounded pool of host slots, one KV block each (all layers of one worker)."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 0:
            raise ValueError("num_slots must not be negative; 0 turns swapping off.")
        self.num_slots = num_slots
        self._free = list(range(num_slots))  # a heap; already sorted
        self._saved: dict[str, SavedBlocks] = {}

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._free)

    def get(self, request_id: str) -> SavedBlocks | None:
        """Return the request's saved blocks, or None."""
        return self._saved.get(request_id)

    def save(self, request_id: str, *, num_tokens: int, num_blocks: int) -> SavedBlocks | None:
        """Reserve slots for `num_blocks` blocks; None, and no change, when fewer are free."""
        assert request_id not in self._saved, f"request {request_id} already has blocks in the host pool"
        assert num_blocks > 0, f"num_blocks is {num_blocks}"
        assert num_tokens > 0, f"num_tokens is {num_tokens}"
        if num_blocks > len(self._free):
            return None
        saved = SavedBlocks(num_tokens, tuple(heapq.heappop(self._free) for _ in range(num_blocks)))
        self._saved[request_id] = saved
        return saved

    def release(self, request_id: str) -> int:
        """Free the request's slots, if it has any; return how many."""
        saved = self._saved.pop(request_id, None)
        if saved is None:
            return 0
        for slot in saved.slots:
            heapq.heappush(self._free, slot)
        return len(saved.slots)

    def release_all(self) -> int:
        """Free every slot (the KV they hold is no longer valid); return how many were held."""
        return sum(self.release(request_id) for request_id in list(self._saved))

    def check(self) -> None:
        """Assert that no slot is lost, held twice, or both held and free."""
        held = [slot for saved in self._saved.values() for slot in saved.slots]
        assert len(self._free) + len(held) == self.num_slots, (
            f"free {len(self._free)} + held {len(held)} != {self.num_slots}"
        )
        assert set(self._free).isdisjoint(held), "a slot is both free and held"
        assert len(set(held)) == len(held), "a slot is held twice"
        assert set(held) | set(self._free) == set(range(self.num_slots)), "a slot outside the pool"
