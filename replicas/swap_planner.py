"""The scheduler's half of the KV connector: which blocks go to host memory and which come back, step by step.

Rules:
- One plan is one step's copies. The worker zeroes first, then copies out, then in, and steps run in order. So a slot must
  not be both filled and emptied by one plan, nor taken again after its copy back. It cannot be: a loaded copy stays saved
  until its plan is taken, and what ends within a step is released only then.
- The slots of a planned load may be taken from the next plan on, even if the load is asynchronous and not done yet: the
  worker orders copies by streams and events. No state is kept here for loads under way.
- A request is swapped out or in at most once per step.
- A copy names the slot's generation. A worker that finds another one in the slot has a stale map and must not load.
- A saved copy ends in exactly one way: loaded (its full blocks stay retained), released (finished, aborted, not wanted,
  load failed), or dropped with all others.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from replicas.host_pool import HostBlockPool


@dataclass(slots=True, kw_only=True)
class SwapPlan:
    """Block copies of one step: device block ids, host slots, and the slots' generations, in lists of equal length."""

    zero_slots: list[int] = field(default_factory=list)
    """Slots that held another tenant's KV, to be zeroed before anything is copied; all of them are in `out_slots`."""

    out_blocks: list[int] = field(default_factory=list)
    out_slots: list[int] = field(default_factory=list)
    out_generations: list[int] = field(default_factory=list)
    in_slots: list[int] = field(default_factory=list)
    in_blocks: list[int] = field(default_factory=list)
    in_generations: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.out_blocks or self.in_blocks)

    def check(self) -> None:
        """Assert that zeroing, copies out and copies in, in this order, mean what was planned."""
        assert len(self.out_blocks) == len(self.out_slots) == len(self.out_generations), "copies out do not match"
        assert len(self.in_blocks) == len(self.in_slots) == len(self.in_generations), "copies in do not match"
        filled = set(self.out_slots)
        assert len(filled) == len(self.out_slots), "two blocks into one slot"
        assert len(set(self.in_blocks)) == len(self.in_blocks), "two slots into one block"
        assert filled.isdisjoint(self.in_slots), "a slot is both filled and emptied"
        assert filled.issuperset(self.zero_slots), "a slot is zeroed that is not filled"


class SwapPlanner:
    """Collects the copies of the step being scheduled and keeps the host pool's books."""

    def __init__(self, pool: HostBlockPool) -> None:
        self.pool = pool
        self.block_size = pool.block_size
        self._plan = SwapPlan()
        self._settling: dict[str, int] = {}
        """Copies that end with this step: by request, the first tokens whose full blocks stay retained."""

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return self.pool.num_blocks(num_tokens)

    def swap_out(self, request_id: str, *, tenant: str, num_tokens: int, block_ids: Sequence[int]) -> int | None:
        """Plan the copy of a victim's blocks to host memory, but for those that are retained there.

        Args:
            num_tokens: Tokens whose KV the blocks hold, from the first token on.
            block_ids: Device block ids of those tokens, in order.

        Returns:
            How many blocks are copied (0: all were retained), or None, and no change, when the pool has no room.
        """
        num_blocks = self.num_blocks(num_tokens)
        assert num_blocks <= len(block_ids), f"{num_tokens} tokens need {num_blocks} blocks, got {len(block_ids)}"
        assert request_id not in self._settling, f"request {request_id} is swapped in by this step"
        reservation = self.pool.save(request_id, tenant=tenant, num_tokens=num_tokens)
        if reservation is None:
            return None
        plan, slots = self._plan, reservation.new_slots
        plan.zero_slots += reservation.zero_slots
        plan.out_blocks += block_ids[reservation.num_kept_blocks : num_blocks]
        plan.out_slots += slots
        plan.out_generations += self.pool.generations(slots)
        return len(slots)

    def num_loadable_tokens(self, request_id: str, *, num_tokens: int, num_cached_tokens: int) -> int:
        """Tokens that a resume can load beyond `num_cached_tokens`, which it finds in the engine's prefix cache.

        One token always stays to be computed (`num_tokens - 1` at most), or the step would have nothing to sample from.
        """
        saved = self.pool.get(request_id)
        if saved is None:
            return 0
        return max(0, min(saved.num_tokens, num_tokens - 1) - num_cached_tokens)

    def swap_in(
        self, request_id: str, *, num_cached_tokens: int, num_loaded_tokens: int, block_ids: Sequence[int]
    ) -> None:
        """Plan the copy back. Full blocks that are then on the device, loaded or cached, stay retained in the pool.

        Args:
            num_cached_tokens: Tokens already in the engine's blocks; a multiple of the block size.
            num_loaded_tokens: Tokens to load behind them; 0 means that nothing of the saved copy is wanted.
            block_ids: Device blocks of the resumed request from its first token on.
        """
        saved = self.pool.get(request_id)
        if saved is None:
            assert num_loaded_tokens == 0, f"request {request_id} has nothing saved to load"
            return
        assert request_id not in self._settling, f"request {request_id} is swapped in twice by this step"
        end = num_cached_tokens + num_loaded_tokens
        if num_loaded_tokens:
            assert num_cached_tokens % self.block_size == 0, f"{num_cached_tokens} cached tokens end inside a block"
            assert end <= saved.num_tokens, f"{end} tokens wanted, {saved.num_tokens} saved"
            first, last = num_cached_tokens // self.block_size, self.num_blocks(end)
            slots = saved.slots[first:last]
            self._plan.in_slots += slots
            self._plan.in_blocks += block_ids[first:last]
            self._plan.in_generations += self.pool.generations(slots)
        self._settling[request_id] = end

    def release(self, request_id: str) -> None:
        """Forget every copy of a request that has finished or was aborted; within a step, at its end."""
        if self._is_in_step:
            self._settling[request_id] = 0
        else:
            self.pool.release(request_id)

    def copies_failed(self, slots: Collection[int]) -> list[str]:
        """Forget every copy that has a part in these slots, whose copies out or in failed; return whose they were.

        What the slots hold is not trusted: those requests recompute.
        """
        requests = self.pool.holders(slots)
        for request_id in requests:
            self.release(request_id)
        return requests

    def take_plan(self) -> SwapPlan:
        """Return the step's copies and start the next step's plan."""
        if not self._is_in_step:
            return SwapPlan()  # as in most steps
        plan, self._plan = self._plan, SwapPlan()
        plan.check()
        settling, self._settling = self._settling, {}
        for request_id, num_tokens in settling.items():
            if num_tokens:
                self.pool.retain(request_id, num_tokens=num_tokens)
            else:
                self.pool.release(request_id)
        return plan

    def drop_all(self) -> int:
        """Forget every copy (the weights or the cache changed); return how many slots were held.

        Only between steps: a plan that was not taken yet would copy into slots that no one owns.
        """
        assert not self._is_in_step, "drop_all inside a step"
        return self.pool.release_all()

    @property
    def _is_in_step(self) -> bool:
        return bool(self._plan or self._settling)
