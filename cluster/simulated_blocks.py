"""KV blocks of a simulated replica with their prefix cache, as vLLM's block manager keeps them (full attention, one group).

Rules:
- A block is free or held. Free ones without content are taken first, then those with content from the least recently freed
  on: what they hold is evicted as they are taken.
- Whoever gives blocks back gives the last one first: what is left of a request's blocks are always its first ones.
- Blocks of a prompt that others may share have keys, one for each full block with all before it; each is a `PrefixBlock`.
  Several may hold the same key (computed beside each other); a hit is the one that was cached first.
- The blocks behind them are found again by their own request alone. They are counted, not listed: held ones by their number,
  free ones as one `OwnBlocks` in the queue.

Source: vLLM 0.29 `v1/core/block_pool.py` (`get_new_blocks`, `touch`, `free_blocks`), `v1/core/kv_cache_manager.py`
(`allocate_slots`), `v1/core/single_type_kv_cache_manager.py` (`get_num_blocks_to_allocate`).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PrefixBlock:
    """One cached block that any request with its key may hold."""

    __slots__ = ("key", "num_holders")

    def __init__(self, key: int) -> None:
        self.key, self.num_holders = key, 1


class OwnBlocks:
    """Free blocks of one request behind its prefix blocks, the first `num_blocks` of those that it had."""

    __slots__ = ("num_blocks",)

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks


class Hit(NamedTuple):
    """What a request finds in the prefix cache."""

    prefix: list[PrefixBlock]
    num_own_blocks: int
    num_free_blocks: int
    """Those of both kinds that are free now: taking them takes them out of the queue."""

    @property
    def num_blocks(self) -> int:
        return len(self.prefix) + self.num_own_blocks


NO_HIT = Hit([], 0, 0)


class Holding:
    """Blocks of one request, but for the number of those that are not cached by key: its engine knows that."""

    __slots__ = ("keys", "own", "prefix")

    def __init__(self, keys: Sequence[int] = ()) -> None:
        """Begin with nothing.

        Args:
            keys: Of the prompt's full blocks, as far as others may share them.
        """
        self.keys = keys
        self.prefix: list[PrefixBlock] = []
        """Held, from the first key on."""
        self.own: OwnBlocks | None = None
        """In the queue, while the request holds nothing."""


class SimulatedBlocks:
    """The pool of one replica."""

    def __init__(self, num_blocks: int, *, caching: bool) -> None:
        """Begin with empty blocks.

        Args:
            num_blocks: As vLLM counts them: one of them is never used (its null block).
            caching: Whether there is a prefix cache.
        """
        assert num_blocks > 1, f"a pool of {num_blocks} blocks, one of them never used"
        self.num_blocks, self.caching = num_blocks, caching
        self.num_free = self._num_empty = num_blocks - 1
        self._queue: OrderedDict[PrefixBlock | OwnBlocks, None] = OrderedDict()
        self._cached: dict[int, list[PrefixBlock]] = {}

    def find(self, holding: Holding, max_blocks: int) -> Hit:
        """The longest run of cached blocks from the request's first on, at most `max_blocks`; nothing changes."""
        if not self.caching:
            return NO_HIT
        prefix: list[PrefixBlock] = []
        num_free = 0
        for key in holding.keys[:max_blocks]:
            copies = self._cached.get(key)
            if copies is None:
                break
            prefix.append(copies[0])
            num_free += not copies[0].num_holders
        num_own = 0
        if holding.own is not None and len(prefix) == len(holding.keys):
            num_own = min(holding.own.num_blocks, max_blocks - len(prefix))
        return Hit(prefix, num_own, num_free + num_own)

    def hold(self, holding: Holding, hit: Hit) -> None:
        """Let a request that holds nothing hold what it has found."""
        assert not holding.prefix, "the request holds blocks already"
        for block in hit.prefix:
            if not block.num_holders:
                del self._queue[block]
            block.num_holders += 1
        holding.prefix = list(hit.prefix)
        if holding.own is not None:
            self._shrink(holding.own, hit.num_own_blocks)
            holding.own = None  # what is left of it is computed anew, and never found again
        self.num_free -= hit.num_free_blocks

    def take(self, num_blocks: int) -> None:
        """Take free blocks out of the queue; what they held is lost."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks wanted of {self.num_free} free ones"
        self.num_free -= num_blocks
        empty = min(num_blocks, self._num_empty)
        self._num_empty -= empty
        num_blocks -= empty
        while num_blocks:
            first = next(iter(self._queue))
            if isinstance(first, OwnBlocks):
                evicted = min(num_blocks, first.num_blocks)
                self._shrink(first, evicted)
                num_blocks -= evicted
            else:
                del self._queue[first]
                self._forget(first)
                num_blocks -= 1

    def cache(self, holding: Holding, num_full_blocks: int) -> None:
        """A request's first blocks are full, or will be with the step's end: those with keys can be found from now on."""
        if not self.caching:
            return
        for key in holding.keys[len(holding.prefix) : num_full_blocks]:
            block = PrefixBlock(key)
            self._cached.setdefault(key, []).append(block)
            holding.prefix.append(block)

    def free(self, holding: Holding, num_blocks: int, num_full_blocks: int) -> None:
        """Give back all that a request holds.

        Args:
            num_blocks: How many that are.
            num_full_blocks: Those of them that are full, and so cached.
        """
        assert holding.own is None, "the request has given its blocks back already"
        num_own = num_full_blocks - len(holding.prefix) if self.caching else 0
        assert num_own >= 0, f"{num_full_blocks} full blocks, {len(holding.prefix)} of them cached by key"
        self.num_free += num_blocks - len(holding.prefix)
        self._num_empty += num_blocks - len(holding.prefix) - num_own
        if num_own:
            holding.own = OwnBlocks(num_own)
            self._queue[holding.own] = None
        for block in reversed(holding.prefix):
            block.num_holders -= 1
            if not block.num_holders:
                self._queue[block] = None
                self.num_free += 1
        holding.prefix = []

    def num_shared(self, holding: Holding) -> int:
        """Held blocks that others hold too; they are the first ones."""
        return sum(block.num_holders > 1 for block in holding.prefix)

    def check(self, holdings: Iterable[tuple[Holding, int]]) -> None:
        """Assert that every block is in one place.

        Args:
            holdings: All that hold something, with the number of blocks that each holds.
        """
        in_queue = sum(one.num_blocks if isinstance(one, OwnBlocks) else 1 for one in self._queue)
        assert self.num_free == self._num_empty + in_queue, (
            f"{self.num_free} free, {self._num_empty} + {in_queue} found"
        )
        num_holders: dict[PrefixBlock, int] = {}
        num_own = 0
        for holding, num_blocks in holdings:
            num_own += num_blocks - len(holding.prefix)
            for block in holding.prefix:
                num_holders[block] = num_holders.get(block, 0) + 1
        assert all(block.num_holders == num for block, num in num_holders.items()), "holders are counted wrongly"
        used = num_own + len(num_holders)
        assert used + self.num_free == self.num_blocks - 1, (
            f"{used} used + {self.num_free} free of {self.num_blocks - 1}"
        )
        for key, copies in self._cached.items():
            assert {one.key for one in copies} == {key}, f"key {key} leads astray"
            assert all((one in self._queue) == (not one.num_holders) for one in copies), "a block is free and held"
        assert all(one.num_blocks > 0 for one in self._queue if isinstance(one, OwnBlocks)), "a run of no blocks"

    def _shrink(self, own: OwnBlocks, num_blocks: int) -> None:
        """Take blocks of a free run; one without any leaves the queue, which keeps its place otherwise."""
        own.num_blocks -= num_blocks
        if not own.num_blocks and own in self._queue:
            del self._queue[own]

    def _forget(self, block: PrefixBlock) -> None:
        copies = self._cached[block.key]
        copies.remove(block)
        if not copies:
            del self._cached[block.key]
