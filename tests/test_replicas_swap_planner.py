"""Goal: whatever is preempted, resumed, aborted and reset in whatever order, a request reads back the KV that it wrote.

Method: sentences about single plans, and a state machine that plays scheduler and worker around the real planner and pool.
Device blocks and host slots are dicts of values, and a value says whose token it is, at which position, of which
generation of the cache. Steps are scheduled ahead of their execution (as asynchronous engines do), every plan is executed
outs first, then everything free or newly handed out is poisoned, then ins; and every forward pass reads all the KV that
its requests should have, partly filled blocks included.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicas.host_pool import HostBlockPool, SavedBlocks
from replicas.swap_planner import SwapPlan, SwapPlanner


def planner_of(num_slots: int, block_size: int = 32) -> SwapPlanner:
    return SwapPlanner(HostBlockPool(num_slots), block_size=block_size)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_a_partly_filled_block_counts_as_one(num_tokens: int, num_blocks: int) -> None:
    assert planner_of(0).num_blocks(num_tokens) == num_blocks


def test_a_victims_blocks_are_paired_with_slots_in_their_order_the_partial_last_one_included() -> None:
    planner = planner_of(8)
    assert planner.swap_out("a", num_tokens=70, block_ids=[40, 7, 23])
    assert planner.take_plan() == SwapPlan(out_blocks=[40, 7, 23], out_slots=[0, 1, 2])
    assert planner.pool.get("a") == SavedBlocks(70, (0, 1, 2))


def test_blocks_allocated_beyond_the_computed_tokens_stay_behind() -> None:
    planner = planner_of(8)
    assert planner.swap_out("a", num_tokens=64, block_ids=[40, 7, 23])
    assert planner.take_plan().out_blocks == [40, 7]


def test_a_victim_that_does_not_fit_changes_neither_plan_nor_pool() -> None:
    planner = planner_of(2)
    assert not planner.swap_out("a", num_tokens=70, block_ids=[40, 7, 23])
    assert not planner.take_plan()
    assert planner.pool.num_used_slots == 0


def test_fewer_blocks_than_the_tokens_need_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="70 tokens need 3 blocks, got 2"):
        planner_of(8).swap_out("a", num_tokens=70, block_ids=[1, 2])


def test_a_plan_is_handed_out_once() -> None:
    planner = planner_of(8)
    planner.swap_out("a", num_tokens=1, block_ids=[5])
    assert planner.take_plan()
    assert not planner.take_plan()


@pytest.mark.parametrize(
    ("saved", "wanted", "cached", "loadable"),
    [
        (70, 71, 0, 70),  # the usual resume: all but the token that was sampled last
        (70, 70, 0, 69),  # one token always stays to be computed
        (70, 71, 64, 6),  # only what the prefix cache does not have
        (70, 71, 70, 0),
        (70, 71, 96, 0),  # the prefix cache has more than was saved
        (64, 200, 32, 32),  # a prefill that was preempted half-way
    ],
)
def test_a_resume_loads_what_is_saved_beyond_the_prefix_cache(
    saved: int, wanted: int, cached: int, loadable: int
) -> None:
    planner = planner_of(8)
    planner.swap_out("a", num_tokens=saved, block_ids=[1, 2, 3])
    assert planner.num_loadable_tokens("a", num_tokens=wanted, num_cached_tokens=cached) == loadable


def test_a_stranger_has_nothing_to_load() -> None:
    planner = planner_of(8)
    assert planner.num_loadable_tokens("a", num_tokens=10, num_cached_tokens=0) == 0
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=0, block_ids=[1])
    assert not planner.take_plan()
    with pytest.raises(AssertionError, match="nothing saved"):
        planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=5, block_ids=[1])


def test_a_resume_copies_only_the_blocks_behind_the_cached_ones_and_frees_every_slot() -> None:
    planner = planner_of(8)
    planner.swap_out("a", num_tokens=70, block_ids=[40, 7, 23])
    planner.take_plan()
    planner.swap_in("a", num_cached_tokens=32, num_loaded_tokens=38, block_ids=[11, 12, 13, 14])
    assert planner.take_plan() == SwapPlan(in_slots=[1, 2], in_blocks=[12, 13])
    assert planner.pool.num_used_slots == 0


def test_a_copy_that_is_not_wanted_any_more_is_released_without_being_read() -> None:
    planner = planner_of(8)
    planner.swap_out("a", num_tokens=70, block_ids=[40, 7, 23])
    planner.take_plan()
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=0, block_ids=[11, 12, 13])
    assert not planner.take_plan()
    assert planner.pool.num_used_slots == 0


@pytest.mark.parametrize(
    ("cached", "loaded", "complaint"), [(33, 5, "end inside a block"), (32, 40, "72 tokens wanted, 70 saved")]
)
def test_a_load_that_cannot_be_right_is_a_bug_of_the_caller(cached: int, loaded: int, complaint: str) -> None:
    planner = planner_of(8)
    planner.swap_out("a", num_tokens=70, block_ids=[40, 7, 23])
    planner.take_plan()
    with pytest.raises(AssertionError, match=complaint):
        planner.swap_in("a", num_cached_tokens=cached, num_loaded_tokens=loaded, block_ids=[1, 2, 3])


def test_all_copies_are_dropped_between_steps_and_never_within_one() -> None:
    planner = planner_of(8)
    planner.swap_out("a", num_tokens=70, block_ids=[40, 7, 23])
    with pytest.raises(AssertionError, match="inside a step"):
        planner.drop_all()
    planner.take_plan()
    assert planner.drop_all() == 3
    assert planner.num_loadable_tokens("a", num_tokens=71, num_cached_tokens=0) == 0


POISON = ("poison", -1, -1)
Value = tuple[str, int, int]  # KV of one token: request, position, generation of the cache
BLOCK_SIZE = 4


@dataclass
class SimRequest:
    """A request as the scheduler sees it."""

    name: str
    num_tokens: int
    """Prompt, and outputs up to the one sampled last."""

    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_pending_steps: int = 0


@dataclass
class Forward:
    """One request's share of a step: reads positions [0, start), writes [start, end)."""

    request: SimRequest
    start: int
    end: int
    blocks: tuple[int, ...]
    generation: int


@dataclass
class Step:
    """A scheduled step on its way to the worker."""

    plan: SwapPlan
    dirty: set[int]
    """Device blocks that hold nothing of value once the outs are done."""

    cached: dict[int, list[Value]]
    """Content of the blocks that were found in the prefix cache."""

    forwards: list[Forward]


class SwapMachine(RuleBasedStateMachine):
    """Scheduler and worker around the real planner; see the top of this file."""

    @initialize(num_blocks=st.integers(4, 16), num_slots=st.integers(0, 24))
    def start(self, num_blocks: int, num_slots: int) -> None:
        self.planner = planner_of(num_slots, BLOCK_SIZE)
        self.num_blocks = num_blocks
        self.free_blocks = list(range(num_blocks))
        self.device: dict[int, list[Value]] = {block: [POISON] * BLOCK_SIZE for block in range(num_blocks)}
        self.host: dict[int, list[Value]] = {slot: [POISON] * BLOCK_SIZE for slot in range(num_slots)}
        self.running: list[SimRequest] = []
        self.waiting: list[SimRequest] = []
        self.saved: dict[str, int] = {}  # the model of what the pool holds: tokens by request
        self.pending: list[Step] = []
        self.generation = 0
        self.num_added = 0

    @precondition(lambda self: len(self.running) + len(self.waiting) < 8)
    @rule(prompts=st.lists(st.integers(1, 14), min_size=1, max_size=4))
    def add(self, prompts: list[int]) -> None:
        for num_tokens in prompts:
            self.num_added += 1
            self.waiting.append(SimRequest(f"r{self.num_added}", num_tokens))

    @rule(num_steps=st.integers(1, 60), num_ahead=st.integers(0, 2), seed=st.integers(0, 2**32))
    def work(self, num_steps: int, num_ahead: int, seed: int) -> None:
        """Some steps, scheduled up to `num_ahead` steps before they are executed."""
        rng = random.Random(seed)
        for _ in range(num_steps):
            self.schedule(rng)
            self.planner.pool.check()
            while len(self.pending) > num_ahead:
                self.execute()

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(self.running + self.waiting)))

    @rule()
    def reset_the_cache(self) -> None:
        """The weights change: no KV from before may be read by any step that is scheduled from here on."""
        assert self.planner.drop_all() == sum(self.planner.num_blocks(tokens) for tokens in self.saved.values())
        self.saved.clear()
        while self.running:
            self.preempt(self.running.pop(), swap=False)
        self.generation += 1

    # The scheduler

    def schedule(self, rng: random.Random) -> None:
        """Grow the running requests, preempt from the end where blocks lack, and admit only where none was preempted."""
        for request in self.running + self.waiting:
            if request.num_tokens >= self.num_blocks * BLOCK_SIZE:
                self.remove(request)  # the longest that the engine can hold: finished
        forwards: list[Forward] = []
        fresh: set[int] = set()
        cached: dict[int, list[Value]] = {}
        preempted = False
        index = 0
        while index < len(self.running):
            request = self.running[index]
            end = request.num_computed + rng.randint(1, request.num_tokens - request.num_computed)
            while (blocks := self.allocate(request, end)) is None:
                preempted = True
                victim = self.running.pop()
                self.preempt(victim)
                if victim is request:
                    break
            if blocks is None:
                break
            fresh |= set(blocks)
            forwards.append(self.forward(request, end))
            index += 1
        while self.waiting and not preempted:
            request = self.waiting[0]
            if request.num_pending_steps:
                break  # its last output is still on the way
            num_hits = rng.choice([0, 0, min(rng.randint(1, 2), (request.num_tokens - 1) // BLOCK_SIZE)])
            if not self.admit(request, num_hits, rng, forwards, fresh, cached):
                break
        self.pending.append(Step(self.planner.take_plan(), fresh | set(self.free_blocks), cached, forwards))

    def allocate(self, request: SimRequest, end: int) -> list[int] | None:
        missing = self.planner.num_blocks(end) - len(request.blocks)
        if missing > len(self.free_blocks):
            return None
        blocks = [self.free_blocks.pop(0) for _ in range(missing)]
        request.blocks += blocks
        return blocks

    def preempt(self, victim: SimRequest, *, swap: bool = True) -> None:
        if swap and victim.num_computed:
            num_blocks = self.planner.num_blocks(victim.num_computed)
            fits = num_blocks <= self.planner.pool.num_free_slots
            assert fits == self.planner.swap_out(victim.name, num_tokens=victim.num_computed, block_ids=victim.blocks)
            if fits:
                self.saved[victim.name] = victim.num_computed
        self.free_blocks += reversed(victim.blocks)
        victim.blocks, victim.num_computed = [], 0
        self.waiting.insert(0, victim)

    def admit(
        self,
        request: SimRequest,
        num_hits: int,
        rng: random.Random,
        forwards: list[Forward],
        fresh: set[int],
        cached: dict[int, list[Value]],
    ) -> bool:
        num_cached = num_hits * BLOCK_SIZE
        num_loaded = self.planner.num_loadable_tokens(
            request.name, num_tokens=request.num_tokens, num_cached_tokens=num_cached
        )
        num_saved = self.saved.get(request.name, 0)
        assert num_loaded == max(0, min(num_saved, request.num_tokens - 1) - num_cached)
        start = num_cached + num_loaded
        end = rng.randint(start + 1, request.num_tokens)
        blocks = self.allocate(request, end)
        if blocks is None:
            return False
        self.planner.swap_in(
            request.name, num_cached_tokens=num_cached, num_loaded_tokens=num_loaded, block_ids=request.blocks
        )
        self.saved.pop(request.name, None)
        fresh |= set(blocks)
        for index in range(num_hits):
            positions = range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
            cached[request.blocks[index]] = [(request.name, position, self.generation) for position in positions]
        request.num_computed = start
        self.waiting.pop(0)
        self.running.append(request)
        forwards.append(self.forward(request, end))
        return True

    def forward(self, request: SimRequest, end: int) -> Forward:
        share = Forward(request, request.num_computed, end, tuple(request.blocks), self.generation)
        request.num_computed = end
        if end == request.num_tokens:
            request.num_tokens += 1  # a token was sampled
        request.num_pending_steps += 1
        return share

    def remove(self, request: SimRequest) -> None:
        self.planner.pool.release(request.name)
        self.saved.pop(request.name, None)
        self.free_blocks += reversed(request.blocks)
        (self.running if request in self.running else self.waiting).remove(request)

    # The worker

    def execute(self) -> None:
        step = self.pending.pop(0)
        plan = step.plan
        assert len(set(plan.out_slots)) == len(plan.out_slots), "two blocks into one slot"
        assert len(set(plan.in_blocks)) == len(plan.in_blocks), "two slots into one block"
        assert set(plan.out_slots).isdisjoint(plan.in_slots), "a slot is filled and emptied in one step"
        assert set(plan.in_blocks).isdisjoint(step.cached), "a load into a block that others may share"
        for block, slot in zip(plan.out_blocks, plan.out_slots, strict=True):
            self.host[slot] = list(self.device[block])
        for block in step.dirty:
            self.device[block] = [POISON] * BLOCK_SIZE
        for block, content in step.cached.items():
            self.device[block] = list(content)
        for slot, block in zip(plan.in_slots, plan.in_blocks, strict=True):
            self.device[block] = list(self.host[slot])
            self.host[slot] = [POISON] * BLOCK_SIZE  # a second load of it must not go unnoticed
        for share in step.forwards:
            self.run_forward(share)

    def run_forward(self, share: Forward) -> None:
        name, generation = share.request.name, share.generation
        for position in range(share.start):
            value = self.device[share.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            assert value == (name, position, generation), f"{name} reads {value} at position {position}"
        for position in range(share.start, share.end):
            self.device[share.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = (name, position, generation)
        share.request.num_pending_steps -= 1

    # At every moment

    @invariant()
    def the_books_agree(self) -> None:
        pool = self.planner.pool
        pool.check()
        held = {name: pool.get(name) for name in [f"r{number + 1}" for number in range(self.num_added)]}
        assert {name: saved.num_tokens for name, saved in held.items() if saved} == self.saved
        assert {request.name for request in self.running}.isdisjoint(self.saved)
        owned = [block for request in self.running for block in request.blocks]
        assert sorted(owned + self.free_blocks) == list(range(self.num_blocks))

    def teardown(self) -> None:
        if not hasattr(self, "planner"):
            return
        while self.pending:
            self.execute()
        for request in self.running + self.waiting:
            self.planner.pool.release(request.name)
        assert self.planner.pool.num_used_slots == 0


TestAnyHistoryOfSwaps = SwapMachine.TestCase
TestAnyHistoryOfSwaps.settings = settings(max_examples=500, stateful_step_count=50, deadline=None)
