"""Book-keeping of host memory slots that hold the KV blocks of swapped-out requests, one slot per block.

Rules:
- A slot is free, saved or retained: `free + saved + retained == num_slots` after every change.
- A *saved* copy is the only one of a request that is swapped out: it covers its blocks from the first one on, the last one
  may be partly filled, and nothing but its end takes a slot away from it.
- A *retained* copy is a spare of a request that is back on the device: its first full blocks, whose KV does not change
  while the request lives, so that they need not be copied out again. It makes room whenever slots are wanted: the request
  whose copy was retained first gives way first, from its last block on.
- A tenant saves at most `max_tenant_fraction` of all slots. Retained ones do not count: they give way to anybody.
- Slots are handed out lowest first, so that the same history gives the same slots. The generation of a slot rises with
  every hand-out: slot and generation together name one content.
- A slot that held one tenant's KV is zeroed before another tenant has it.
"""

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBlocks:
    """One swapped-out request's KV in host memory."""

    tenant: str
    num_tokens: int
    """Tokens whose KV is valid, counted from the first token."""

    slots: tuple[int, ...]
    """Host slot of the request's i-th block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What is to be done so that a request's saved copy is complete."""

    num_kept_blocks: int
    """First blocks that were retained: nothing to copy."""

    new_slots: list[int]
    """Slots to fill with the blocks behind them."""

    zero_slots: list[int]
    """Those of the new slots that held another tenant's KV: to be zeroed before they are filled."""


class HostBlockPool:
    """A bounded pool of host slots, one KV block each (all layers of one worker)."""

    def __init__(self, num_slots: int, *, block_size: int, max_tenant_fraction: float = 1.0) -> None:
        """Start with every slot free.

        Args:
            block_size: Tokens per KV block.
            max_tenant_fraction: Share of the slots that one tenant's saved copies may hold, rounded down to slots.

        Raises:
            ValueError: A number is out of its range.
        """
        if num_slots < 0:
            raise ValueError("num_slots must not be negative; 0 turns swapping off.")
        if block_size < 1:
            raise ValueError("block_size must be at least 1 token.")
        if not 0.0 < max_tenant_fraction <= 1.0:
            raise ValueError("max_tenant_fraction must be above 0 and at most 1; 1 lets one tenant use the whole pool.")
        self.num_slots = num_slots
        self.block_size = block_size
        self.max_tenant_slots = int(max_tenant_fraction * num_slots)
        self._free: list[int] = []  # a heap; all of them were handed out before
        self._num_fresh = num_slots  # never handed out, and behind all others: nothing is kept of them
        self._saved: dict[str, SavedBlocks] = {}
        self._num_saved_of: dict[str, int] = {}  # slots by tenant; only tenants who have any
        self._retained: dict[str, list[int]] = {}  # in the order in which they give way
        self._num_retained = 0
        self.most_used_slots = 0
        """Saved slots at once so far."""

        self._generations: list[int] = []
        self._last_tenant: list[str] = []

    @property
    def num_free_slots(self) -> int:
        return len(self._free) + self._num_fresh

    @property
    def num_used_slots(self) -> int:
        """Saved slots."""
        return self.num_slots - self.num_free_slots - self._num_retained

    @property
    def num_retained_slots(self) -> int:
        return self._num_retained

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_retained_blocks(self, request_id: str) -> int:
        """First full blocks of a request on the device whose host copies are still good."""
        return len(self._retained.get(request_id, ()))

    def num_available_slots(self, tenant: str, request_id: str | None = None) -> int:
        """Slots that the tenant's request could take beside the ones that it has retained.

        Below 0 when the tenant's cap would not even let those be saved. So `save` succeeds if and only if
        `max(0, num_blocks - num_retained_blocks) <= num_available_slots`.
        """
        num_own = 0 if request_id is None else self.num_retained_blocks(request_id)
        return self._num_available(tenant, num_own)

    def room_of(self, tenant: str, request_id: str) -> tuple[int, int]:
        """`num_retained_blocks` and `num_available_slots` of a request, at once: for hundreds of them in a step."""
        retained = self._retained.get(request_id)
        num_own = len(retained) if retained is not None else 0
        return num_own, self._num_available(tenant, num_own)

    def _num_available(self, tenant: str, num_own: int) -> int:
        num_reclaimable = len(self._free) + self._num_fresh + self._num_retained - num_own
        num_below_cap = self.max_tenant_slots - self._num_saved_of.get(tenant, 0) - num_own
        return num_reclaimable if num_reclaimable < num_below_cap else num_below_cap

    def generations(self, slots: Sequence[int]) -> list[int]:
        """How often each of the slots was handed out."""
        known = self._generations
        return [known[slot] if slot < len(known) else 0 for slot in slots]

    def get(self, request_id: str) -> SavedBlocks | None:
        """Return the request's saved copy, or None."""
        return self._saved.get(request_id)

    def holders(self, slots: Collection[int]) -> list[str]:
        """Requests that have a saved or retained copy in any of the slots; a scan, for rare events."""
        wanted = set(slots)
        saved = [request_id for request_id, copy in self._saved.items() if wanted.intersection(copy.slots)]
        return saved + [request_id for request_id, own in self._retained.items() if wanted.intersection(own)]

    def save(self, request_id: str, *, tenant: str, num_tokens: int) -> Reservation | None:
        """Reserve slots for a request's KV, its retained ones first; None, and no change, when there is no room."""
        assert request_id not in self._saved, f"request {request_id} already has blocks in the host pool"
        assert num_tokens > 0, f"num_tokens is {num_tokens}"
        num_blocks = self.num_blocks(num_tokens)
        num_new = max(0, num_blocks - self.num_retained_blocks(request_id))
        if num_new > self.num_available_slots(tenant, request_id):
            return None
        retained = self._pop_retained(request_id)
        assert not retained or self._last_tenant[retained[0]] == tenant, f"request {request_id} changed its tenant"
        # A recomputed request may be further behind than its retained copy.
        kept = retained[:num_blocks]
        self._free_slots(retained[num_blocks:])
        self._evict(num_new - self.num_free_slots)
        new, zero = self._hand_out(num_new, tenant)
        self._saved[request_id] = SavedBlocks(tenant=tenant, num_tokens=num_tokens, slots=(*kept, *new))
        self._num_saved_of[tenant] = self._num_saved_of.get(tenant, 0) + num_blocks
        self.most_used_slots = max(self.most_used_slots, self.num_used_slots)
        assert self._num_saved_of[tenant] <= self.max_tenant_slots, f"tenant {tenant} is above its cap"
        self._assert_conserved()
        return Reservation(num_kept_blocks=len(kept), new_slots=new, zero_slots=zero)

    def retain(self, request_id: str, *, num_tokens: int) -> None:
        """The request's first `num_tokens` tokens are back on the device: keep the full ones' copies as retained."""
        saved = self._pop_saved(request_id)
        num_full_blocks = min(num_tokens, saved.num_tokens) // self.block_size
        if num_full_blocks:
            self._retained[request_id] = list(saved.slots[:num_full_blocks])
            self._num_retained += num_full_blocks
        self._free_slots(saved.slots[num_full_blocks:])
        self._assert_conserved()

    def release(self, request_id: str) -> int:
        """Free what the request has in the pool, saved or retained; return how many slots."""
        slots = self._pop_saved(request_id).slots if request_id in self._saved else self._pop_retained(request_id)
        self._free_slots(slots)
        self._assert_conserved()
        return len(slots)

    def release_all(self) -> int:
        """Free every slot (the KV they hold is no longer valid); return how many were saved or retained."""
        return sum(self.release(request_id) for request_id in [*self._saved, *self._retained])

    def check(self) -> None:
        """Assert that every slot is in exactly one place, and that every count is right."""
        saved = [slot for copy in self._saved.values() for slot in copy.slots]
        retained = [slot for slots in self._retained.values() for slot in slots]
        num_used = self.num_slots - self._num_fresh
        places = [*self._free, *saved, *retained, *range(num_used, self.num_slots)]
        assert len(self._generations) == len(self._last_tenant) == num_used, "a slot of which nothing is known"
        assert len(places) == self.num_slots, (
            f"free {self.num_free_slots} + saved {len(saved)} + retained {len(retained)} != {self.num_slots}"
        )
        assert len(set(places)) == len(places), "a slot is in two places"
        assert set(places) == set(range(self.num_slots)), "a slot outside the pool"
        assert self._num_retained == len(retained), f"{self._num_retained} counted as retained, not {len(retained)}"
        assert all(self._retained.values()), "a retained copy of nothing"
        assert self._saved.keys().isdisjoint(self._retained), "a request is both saved and retained"
        num_saved_of: dict[str, int] = {}
        for copy in self._saved.values():
            assert len(copy.slots) == self.num_blocks(copy.num_tokens), "a saved copy has not one slot per block"
            assert {self._last_tenant[slot] for slot in copy.slots} == {copy.tenant}, "a slot of another tenant"
            num_saved_of[copy.tenant] = num_saved_of.get(copy.tenant, 0) + len(copy.slots)
        assert self._num_saved_of == num_saved_of, f"{self._num_saved_of} counted by tenant, not {num_saved_of}"
        assert max(num_saved_of.values(), default=0) <= self.max_tenant_slots, "a tenant is above its cap"

    def _hand_out(self, num_slots: int, tenant: str) -> tuple[list[int], list[int]]:
        """Take the lowest free slots for the tenant; return them, and those among them that must be zeroed."""
        slots = [heapq.heappop(self._free) for _ in range(min(num_slots, len(self._free)))]
        zero = [slot for slot in slots if self._last_tenant[slot] != tenant]
        for slot in slots:
            self._generations[slot] += 1
            self._last_tenant[slot] = tenant
        first, num_fresh = self.num_slots - self._num_fresh, num_slots - len(slots)
        assert num_fresh <= self._num_fresh, f"{num_slots} slots wanted, {len(slots) + self._num_fresh} free"
        self._num_fresh -= num_fresh
        self._generations += [1] * num_fresh
        self._last_tenant += [tenant] * num_fresh
        return [*slots, *range(first, first + num_fresh)], zero

    def _evict(self, num_slots: int) -> None:
        """Free so many retained slots, if any are wanted."""
        while num_slots > 0:
            request_id, slots = next(iter(self._retained.items()))
            evicted = slots[-num_slots:]
            del slots[-num_slots:]
            if not slots:
                del self._retained[request_id]
            self._num_retained -= len(evicted)
            self._free_slots(evicted)
            num_slots -= len(evicted)

    def _pop_saved(self, request_id: str) -> SavedBlocks:
        saved = self._saved.pop(request_id)
        self._num_saved_of[saved.tenant] -= len(saved.slots)
        if not self._num_saved_of[saved.tenant]:
            del self._num_saved_of[saved.tenant]
        return saved

    def _pop_retained(self, request_id: str) -> list[int]:
        slots = self._retained.pop(request_id, [])
        self._num_retained -= len(slots)
        return slots

    def _free_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            heapq.heappush(self._free, slot)

    def _assert_conserved(self) -> None:
        num_saved = sum(self._num_saved_of.values())
        assert self.num_free_slots + num_saved + self._num_retained == self.num_slots, (
            f"free {self.num_free_slots} + saved {num_saved} + retained {self._num_retained} != {self.num_slots}"
        )
