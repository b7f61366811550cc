"""The scheduler's half of the KV connector: which blocks go to host memory and which come back, step by step.

Rules:
- In one step the worker copies out first and in afterwards, and steps run in order. So a slot whose copy back is in this
  step's plan can be taken again from the next step on, never within the same one.
- A saved copy ends in exactly one way: loaded, released (finished, aborted, not wanted), or dropped with all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from replicas.host_pool import HostBlockPool


@dataclass(slots=True)
class SwapPlan:
    """Block copies of one step. Four lists of equal length in pairs: device block id and host slot."""

    out_blocks: list[int] = field(default_factory=list)
    out_slots: list[int] = field(default_factory=list)
    in_slots: list[int] = field(default_factory=list)
    in_blocks: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.out_blocks or self.in_blocks)


class SwapPlanner:
    """Collects the copies of the step being scheduled and keeps the host pool's books."""

    def __init__(self, pool: HostBlockPool, *, block_size: int) -> None:
        assert block_size > 0, f"block_size is {block_size}"
        self.pool = pool
        self.block_size = block_size
        self._plan = SwapPlan()

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def swap_out(self, request_id: str, *, num_tokens: int, block_ids: Sequence[int]) -> bool:
        """Plan the copy of a victim's blocks to host memory; False, and no change, when the pool has no room.

        Args:
            num_tokens: Tokens whose KV the blocks hold, from the first token on.
            block_ids: Device block ids of those tokens, in order.
        """
        num_blocks = self.num_blocks(num_tokens)
        assert num_blocks <= len(block_ids), f"{num_tokens} tokens need {num_blocks} blocks, got {len(block_ids)}"
        saved = self.pool.save(request_id, num_tokens=num_tokens, num_blocks=num_blocks)
        if saved is None:
            return False
        self._plan.out_blocks += block_ids[:num_blocks]
        self._plan.out_slots += saved.slots
        return True

    def num_loadable_tokens(self, request_id: str, *, num_tokens: int, num_cached_tokens: int) -> int:
        """Tokens that a resume can load beyond `num_cached_tokens`, which it finds in the engine's prefix cache.

        One token always stays to be computed (`num_tokens - 1` at most), or the step would have nothing to sample from.
        """
        saved = self.pool.get(request_id)
        if saved is None:
            return 0
        return max(0, min(saved.num_tokens, num_tokens - 1) - num_cached_tokens)

    def swap_in(self, request_id: str, *, num_cached_tokens: int, num_loaded_tokens: int, block_ids: list[int]) -> None:
        """Plan the copy back and give the slots free.

        Args:
            num_cached_tokens: Tokens already in the engine's blocks; a multiple of the block size.
            num_loaded_tokens: Tokens to load behind them; 0 means that the saved copy is not wanted.
            block_ids: Device blocks of the resumed request from its first token on.
        """
        saved = self.pool.get(request_id)
        if saved is None:
            assert num_loaded_tokens == 0, f"request {request_id} has nothing saved to load"
            return
        if num_loaded_tokens:
            assert num_cached_tokens % self.block_size == 0, f"{num_cached_tokens} cached tokens end inside a block"
            end = num_cached_tokens + num_loaded_tokens
            assert end <= saved.num_tokens, f"{end} tokens wanted, {saved.num_tokens} saved"
            first, last = num_cached_tokens // self.block_size, self.num_blocks(end)
            self._plan.in_slots += saved.slots[first:last]
            self._plan.in_blocks += block_ids[first:last]
        self.pool.release(request_id)

    def take_plan(self) -> SwapPlan:
        """Return the step's copies and start the next step's plan."""
        plan, self._plan = self._plan, SwapPlan()
        assert len(plan.out_blocks) == len(plan.out_slots), "copies out are not in pairs"
        assert len(plan.in_blocks) == len(plan.in_slots), "copies in are not in pairs"
        return plan

    def drop_all(self) -> int:
        """Forget every saved copy (the weights or the cache changed); return how many slots were held.

        Only between steps: a plan that was not taken yet would copy into slots that no one owns.
        """
        assert not self._plan, "drop_all inside a step"
        return self.pool.release_all()
