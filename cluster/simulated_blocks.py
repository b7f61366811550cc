"""KV blocks of a simulated replica with their prefix cache, as vLLM's block manager keeps them (full attention, one group).

Rules:
- A block is free or held. Free ones without content are taken first, then those with content from the least recently freed
  on: what they hold is evicted as they are taken.
- Whoever gives blocks back gives the last one first: what is left of a request's blocks are always its first ones.
- Blocks are kept in runs, one behind another in a request, that are held and freed together. A run is parted where somebody
  holds only a part of it; its last blocks are evicted first, so that what is left is a run again.
- Blocks of a prompt that others may share are found by key and place, in a `PrefixRun`. Several runs may have the same ones
  (computed beside each other); a hit is the one that was cached first.
- The blocks behind them are found again by their own request alone. While held they are counted, not listed.

Source: vLLM 0.29 `v1/core/block_pool.py` (`get_new_blocks`, `touch`, `free_blocks`), `v1/core/kv_cache_manager.py`
(`allocate_slots`), `v1/core/single_type_kv_cache_manager.py` (`get_num_blocks_to_allocate`).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PrefixPart(NamedTuple):
    """Full blocks of a prompt, one behind another, that are the same wherever their key is."""

    key: int
    num_blocks: int


class Batch:
    """What one request gave back at once and is still free: runs in the order of the request, evicted from the end."""

    __slots__ = ("runs",)

    def __init__(self, runs: "list[Run]") -> None:
        self.runs = runs
        for run in runs:
            run.batch = self


class Run:
    """Blocks of one request, one behind another."""

    __slots__ = ("batch", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.batch: Batch | None = None
        """Where it is queued; None while it is held."""


class PrefixRun(Run):
    """Cached blocks that any request with their key may hold."""

    __slots__ = ("first", "holders", "key")

    def __init__(self, key: int, first: int, num_blocks: int, holders: "Iterable[Holding]") -> None:
        super().__init__(num_blocks)
        self.key, self.first = key, first
        """The part of a prompt, and the run's first block in it."""
        self.holders = set(holders)

    @property
    def end(self) -> int:
        """The block behind its last one."""
        return self.first + self.num_blocks


class Hit(NamedTuple):
    """What a request finds in the prefix cache."""

    prefix: list[PrefixRun]
    num_prefix_blocks: int
    num_own_blocks: int
    num_free_blocks: int
    """Those of both kinds that are free now: taking them takes them out of the queue."""

    @property
    def num_blocks(self) -> int:
        return self.num_prefix_blocks + self.num_own_blocks


NO_HIT = Hit([], 0, 0, 0)


class Holding:
    """Blocks of one request, but for the number of those that are not cached by key: its engine knows that."""

    __slots__ = ("num_prefix_blocks", "own", "parts", "prefix")

    def __init__(self, parts: Sequence[PrefixPart] = ()) -> None:
        """Begin with nothing.

        Args:
            parts: Of the prompt's full blocks from the first on, as far as others may share them.
        """
        self.parts = parts
        self.prefix: list[PrefixRun] = []
        """Held, from the first part on."""
        self.num_prefix_blocks = 0
        self.own: Run | None = None
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
        self.num_free = self.num_empty = num_blocks - 1
        """Free blocks, and those of them without content: whoever freed such a one last has it taken first."""
        self._queue: OrderedDict[Batch, None] = OrderedDict()
        self._cached: dict[int, list[PrefixRun]] = {}
        """By key, in the order in which they were cached."""

    def find(self, holding: Holding, max_blocks: int) -> Hit:
        """The longest run of cached blocks from the request's first on, at most `max_blocks`; runs may be parted for it."""
        if not self.caching:
            return NO_HIT
        prefix: list[PrefixRun] = []
        num_found = num_free = num_own = 0
        for key, num_blocks in holding.parts:
            start, end = 0, min(num_blocks, max_blocks - num_found)
            while start < end and (run := self._run_at(key, start, end)) is not None:
                prefix.append(run)
                num_free += 0 if run.holders else run.num_blocks
                start = run.end
            num_found += start
            if start < num_blocks:
                break
        else:
            if holding.own is not None:
                num_own = min(holding.own.num_blocks, max_blocks - num_found)
        return Hit(prefix, num_found, num_own, num_free + num_own)

    def hold(self, holding: Holding, hit: Hit) -> None:
        """Let a request that holds nothing hold what it has found."""
        assert not holding.prefix, "the request holds blocks already"
        for run in hit.prefix:
            if run.batch is not None:
                self._leave_queue(run)
            run.holders.add(holding)
        holding.prefix, holding.num_prefix_blocks = list(hit.prefix), hit.num_prefix_blocks
        if holding.own is not None:
            # Its first blocks; what is left of it is computed anew, and never found again.
            self._shrink(holding.own, hit.num_own_blocks)
            holding.own = None
        self.num_free -= hit.num_free_blocks

    def take(self, num_blocks: int) -> None:
        """Take free blocks out of the queue; what they held is lost."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks wanted of {self.num_free} free ones"
        self.num_free -= num_blocks
        empty = min(num_blocks, self.num_empty)
        self.num_empty -= empty
        num_blocks -= empty
        while num_blocks:
            run = next(iter(self._queue)).runs[-1]
            evicted = min(num_blocks, run.num_blocks)
            self._shrink(run, evicted)
            if not run.num_blocks and isinstance(run, PrefixRun):
                self._forget(run)
            num_blocks -= evicted

    def cache(self, holding: Holding, num_full_blocks: int) -> None:
        """A request's first blocks are full, or will be with the step's end: those with keys can be found from now on."""
        if not self.caching:
            return
        start = 0
        for key, num_blocks in holding.parts:
            num_new = min(start + num_blocks, num_full_blocks) - holding.num_prefix_blocks
            if num_new > 0:
                run = PrefixRun(key, holding.num_prefix_blocks - start, num_new, [holding])
                self._cached.setdefault(key, []).append(run)
                holding.prefix.append(run)
                holding.num_prefix_blocks += num_new
            start += num_blocks

    def free(self, holding: Holding, num_blocks: int, num_full_blocks: int) -> None:
        """Give back all that a request holds.

        Args:
            num_blocks: How many that are.
            num_full_blocks: Those of them that are full, and so cached.
        """
        assert holding.own is None, "the request has given its blocks back already"
        num_own = num_full_blocks - holding.num_prefix_blocks if self.caching else 0
        assert num_own >= 0, f"{num_full_blocks} full blocks, {holding.num_prefix_blocks} of them cached by key"
        freed: list[Run] = []
        for run in holding.prefix:
            run.holders.remove(holding)
            if not run.holders:
                freed.append(run)
                self.num_free += run.num_blocks
        if num_own:
            holding.own = Run(num_own)
            freed.append(holding.own)
        if freed:
            self._queue[Batch(freed)] = None
        self.num_free += num_blocks - holding.num_prefix_blocks
        self.num_empty += num_blocks - holding.num_prefix_blocks - num_own
        holding.prefix, holding.num_prefix_blocks = [], 0

    def num_shared(self, holding: Holding) -> int:
        """Held blocks that others hold too; they are the first ones."""
        return sum([run.num_blocks for run in holding.prefix if len(run.holders) > 1]) if holding.prefix else 0

    def check(self, holdings: Iterable[tuple[Holding, int]]) -> None:
        """Assert that every block is in one place.

        Args:
            holdings: All that hold something, with the number of blocks that each holds.
        """
        queued = [run for batch in self._queue for run in batch.runs]
        num_queued = sum(run.num_blocks for run in queued)
        assert self.num_free == self.num_empty + num_queued, (
            f"{self.num_free} free, {self.num_empty} + {num_queued} found"
        )
        assert all(batch.runs for batch in self._queue), "a batch of no runs"
        assert all(run.num_blocks > 0 and run.batch in self._queue for run in queued), "a run of no blocks, or astray"
        held: dict[PrefixRun, set[Holding]] = {}
        num_own = 0
        for holding, num_blocks in holdings:
            assert holding.num_prefix_blocks == sum(run.num_blocks for run in holding.prefix), "blocks counted wrongly"
            num_own += num_blocks - holding.num_prefix_blocks
            for run in holding.prefix:
                held.setdefault(run, set()).add(holding)
        assert all(run.holders == holders for run, holders in held.items()), "holders are counted wrongly"
        used = num_own + sum(run.num_blocks for run in held)
        assert used + self.num_free == self.num_blocks - 1, (
            f"{used} used + {self.num_free} free of {self.num_blocks - 1}"
        )
        for key, copies in self._cached.items():
            assert {run.key for run in copies} == {key}, f"key {key} leads astray"
            assert all((run.batch is None) == bool(run.holders) for run in copies), "a run is free and held"

    def _run_at(self, key: int, start: int, end: int) -> PrefixRun | None:
        """The run that was cached first of those with a part's block, parted so that it begins there and ends by `end`."""
        # Blocks further on were not cached before this one's first copy: whoever had them had a copy of this one before,
        # and that one is evicted after them.
        for run in self._cached.get(key, ()):
            if run.first <= start < run.end:
                if run.first < start:
                    run = self._part(run, start)
                if run.end > end:
                    self._part(run, end)
                return run
        return None

    def _part(self, run: PrefixRun, at: int) -> PrefixRun:
        """Let a run end before a block, and return a run of the rest, beside it in every place."""
        rest = PrefixRun(run.key, at, run.end - at, run.holders)
        run.num_blocks -= rest.num_blocks
        rest.batch = run.batch
        beside: list[list[PrefixRun]] = [self._cached[run.key], *(holding.prefix for holding in run.holders)]
        for runs in beside:
            runs.insert(runs.index(run) + 1, rest)
        if run.batch is not None:
            run.batch.runs.insert(run.batch.runs.index(run) + 1, rest)
        return rest

    def _shrink(self, run: Run, num_blocks: int) -> None:
        """Take blocks of a free run; one without any leaves the queue, which keeps its order otherwise."""
        run.num_blocks -= num_blocks
        if not run.num_blocks and run.batch is not None:
            self._leave_queue(run)

    def _leave_queue(self, run: Run) -> None:
        batch, run.batch = run.batch, None
        assert batch is not None, "the run is not queued"
        batch.runs.remove(run)
        if not batch.runs:
            del self._queue[batch]

    def _forget(self, run: PrefixRun) -> None:
        copies = self._cached[run.key]
        copies.remove(run)
        if not copies:
            del self._cached[run.key]
