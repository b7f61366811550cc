"""Goal: no history of swaps makes a request read one byte that is not its own, and none leaves a slot behind.

Method: a random engine drives the real planner and pool with pools so small that they overflow, and a fake worker executes
its plans on numpy arrays, up to two steps late, as engines that schedule ahead do. The worker knows nothing but plans: it
zeroes, copies out, poisons every block that was freed, copies in, and refuses a slot whose generation is not the planned
one. Every forward pass compares all the KV that its request should have. A KV value names its tenant, so that a slot in
which another tenant's KV was left is seen too. Then 10**6 blocks with partly filled tails go out and back.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from replicas.host_pool import HostBlockPool
from replicas.swap_planner import SwapPlan, SwapPlanner

BLOCK_SIZE = 4
MAX_TOKENS = 28
NUM_TENANTS = 4
POISON = -1

Values = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Request:
    """A request, and the KV that each of its tokens has whenever it is computed."""

    name: str
    tenant: int
    kv: Values
    num_tokens: int = 1
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Forward:
    """One request's share of a step: reads the KV of tokens [0, start), writes that of [start, end)."""

    kv: Values
    blocks: list[int]
    start: int
    end: int


@dataclass(slots=True, kw_only=True)
class Step:
    """A step on its way to the worker."""

    plan: SwapPlan = field(default_factory=SwapPlan)
    out_tenants: list[int] = field(default_factory=list)
    freed_blocks: list[int] = field(default_factory=list)
    cached: list[tuple[list[int], Values]] = field(default_factory=list)
    """Blocks found in the prefix cache, and what they hold."""

    forwards: list[Forward] = field(default_factory=list)


class Worker:
    """Device blocks, host slots, and the map of what the slots hold."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.device: Values = np.full((num_blocks, BLOCK_SIZE), POISON)
        self.host: Values = np.full((num_slots, BLOCK_SIZE), POISON)
        self.generations = [0] * num_slots

    def execute(self, step: Step) -> None:
        if step.plan.out_blocks:
            self.copy_out(step.plan, step.out_tenants)
        if step.freed_blocks:
            self.device[step.freed_blocks] = POISON
        for blocks, values in step.cached:
            assert set(blocks).isdisjoint(step.plan.in_blocks), "a load into a block that others may share"
            self.device[blocks] = values.reshape(-1, BLOCK_SIZE)
        if step.plan.in_blocks:
            self.copy_in(step.plan)
        for forward in step.forwards:
            rows = self.device[forward.blocks]
            values = rows.reshape(-1)
            assert values[: forward.start].tobytes() == forward.kv[: forward.start].tobytes(), "somebody else's KV"
            values[forward.start : forward.end] = forward.kv[forward.start : forward.end]
            self.device[forward.blocks] = rows

    def copy_out(self, plan: SwapPlan, tenants: list[int]) -> None:
        self.host[plan.zero_slots] = 0
        left = self.host[plan.out_slots]
        assert ((left <= 0) | (left % NUM_TENANTS == np.array(tenants)[:, None])).all(), "another tenant's KV in a slot"
        self.host[plan.out_slots] = self.device[plan.out_blocks]
        for slot, generation in zip(plan.out_slots, plan.out_generations, strict=True):
            self.generations[slot] = generation

    def copy_in(self, plan: SwapPlan) -> None:
        assert [self.generations[slot] for slot in plan.in_slots] == plan.in_generations, "a stale slot"
        self.device[plan.in_blocks] = self.host[plan.in_slots]


class Engine:
    """A scheduler that does at random what vLLM's may do, each request at most one thing per step."""

    def __init__(self, seed: int, *, num_blocks: int, num_slots: int, fraction: float, num_ahead: int) -> None:
        self.rng, self.numpy_rng = random.Random(seed), np.random.default_rng(seed)
        self.pool = HostBlockPool(num_slots, block_size=BLOCK_SIZE, max_tenant_fraction=fraction)
        self.planner = SwapPlanner(self.pool)
        self.worker = Worker(num_blocks, num_slots)
        self.num_ahead = num_ahead
        self.free_blocks = list(range(num_blocks))
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.busy: set[str] = set()
        """Who had its turn in this step."""
        self.step = Step()
        self.pending: list[Step] = []
        self.seen: Counter[str] = Counter()
        self.num_added = 0

    def run_step(self) -> None:
        """What happens between steps, one step's schedule, and as much work as is due."""
        for act, probability in ((self.abort_any, 0.05), (self.fail_load, 0.02), (self.reset, 0.004)):
            if self.rng.random() < probability:
                act()
        acts = [
            self.add,
            self.grow,
            self.grow,
            self.swap_out,
            self.swap_out,
            self.resume,
            self.resume,
            self.abort_waiting,
        ]
        for act in self.rng.choices([*acts, self.recompute], k=self.rng.randint(1, 8)):
            act()
        step, self.step = self.step, Step()
        if self.rng.random() < 0.05:
            self.abort_any()  # even what this step loads: its blocks are free from the next step on
        step.plan = self.planner.take_plan()
        self.pool.check()
        self.seen["slots zeroed"] += len(step.plan.zero_slots)
        self.busy.clear()
        self.pending.append(step)
        self.work(self.num_ahead)

    def work(self, num_ahead: int) -> None:
        while len(self.pending) > num_ahead:
            self.worker.execute(self.pending.pop(0))

    def pick(self, requests: list[Request]) -> Request | None:
        idle = [request for request in requests if request.name not in self.busy]
        return self.rng.choice(idle) if idle else None

    # What a request may do

    def new_kv(self, tenant: int) -> Values:
        return self.numpy_rng.integers(1, 2**60, MAX_TOKENS) * NUM_TENANTS + tenant

    def add(self) -> None:
        if len(self.running) + len(self.waiting) < 9:
            self.num_added += 1
            tenant = self.rng.randrange(NUM_TENANTS)
            self.waiting.append(Request(f"r{self.num_added}", tenant, self.new_kv(tenant)))

    def grow(self) -> None:
        if request := self.pick(self.running):
            self.forward(request, request.num_computed)

    def swap_out(self) -> None:
        request = self.pick(self.running)
        if request is None:
            return
        num_retained = self.pool.num_retained_blocks(request.name)
        num_copies = max(0, self.planner.num_blocks(request.num_computed) - num_retained)
        num_available = self.pool.num_available_slots(str(request.tenant), request.name)
        assert self.pool.room_of(str(request.tenant), request.name) == (num_retained, num_available)
        fits = num_copies <= num_available
        num_evictable = self.pool.num_retained_slots - num_retained
        num_copied = self.planner.swap_out(
            request.name, tenant=str(request.tenant), num_tokens=request.num_computed, block_ids=request.blocks
        )
        assert num_copied == (num_copies if fits else None)
        if fits:
            self.step.out_tenants += [request.tenant] * num_copies
            self.seen["blocks copied"] += num_copies
            self.seen["blocks kept"] += self.planner.num_blocks(request.num_computed) - num_copies
            self.seen["slots evicted"] += num_evictable - self.pool.num_retained_slots
            self.seen["swaps without a copy"] += num_copies == 0
        else:
            self.seen["refused at the cap"] += num_copies <= self.pool.num_free_slots
            self.seen["refused by a full pool"] += num_copies > self.pool.num_free_slots
        self.put_back(request)

    def recompute(self) -> None:
        if request := self.pick(self.running):
            self.put_back(request)

    def resume(self) -> None:
        request = self.pick(self.waiting)
        if request is None:
            return
        num_hits = self.rng.choice([0, 0, self.rng.randint(0, (request.num_tokens - 1) // BLOCK_SIZE)])
        num_cached = num_hits * BLOCK_SIZE
        num_loaded = self.planner.num_loadable_tokens(
            request.name, num_tokens=request.num_tokens, num_cached_tokens=num_cached
        )
        start = num_cached + num_loaded
        if not self.allocate(request, start + 1):
            return
        self.planner.swap_in(
            request.name, num_cached_tokens=num_cached, num_loaded_tokens=num_loaded, block_ids=request.blocks
        )
        self.step.cached.append((request.blocks[:num_hits], request.kv[:num_cached]))
        self.waiting.remove(request)
        self.running.append(request)
        self.seen["whole loads"] += num_loaded > 0 and num_cached == 0
        self.seen["loads behind cached blocks"] += num_loaded > 0 and num_cached > 0
        self.forward(request, start)

    def forward(self, request: Request, start: int) -> None:
        """Compute a few tokens from `start` on, as far as there are blocks for them."""
        self.busy.add(request.name)
        end = min(start + self.rng.randint(1, 6), MAX_TOKENS)
        if not self.allocate(request, end):
            end = min(end, len(request.blocks) * BLOCK_SIZE)
        self.step.forwards.append(Forward(kv=request.kv, blocks=list(request.blocks), start=start, end=end))
        request.num_computed = end
        request.num_tokens = max(request.num_tokens, min(end + self.rng.randint(0, 1), MAX_TOKENS))

    def allocate(self, request: Request, num_tokens: int) -> bool:
        num_missing = self.planner.num_blocks(num_tokens) - len(request.blocks)
        if num_missing > len(self.free_blocks):
            return False
        request.blocks += [self.free_blocks.pop() for _ in range(num_missing)]
        return True

    def free(self, request: Request) -> None:
        self.rng.shuffle(request.blocks)
        self.free_blocks += request.blocks
        self.step.freed_blocks += request.blocks
        request.blocks, request.num_computed = [], 0

    def put_back(self, request: Request) -> None:
        self.busy.add(request.name)
        self.free(request)
        self.running.remove(request)
        self.waiting.append(request)

    # What ends copies

    def abort_waiting(self) -> None:
        if self.waiting and self.rng.random() < 0.2:
            self.end(self.rng.choice(self.waiting))

    def abort_any(self) -> None:
        if self.running or self.waiting:
            self.end(self.rng.choice(self.running + self.waiting))

    def end(self, request: Request) -> None:
        self.planner.release(request.name)
        self.free(request)
        (self.running if request in self.running else self.waiting).remove(request)

    def fail_load(self) -> None:
        """What one request loads or could load is garbage from here on."""
        if request := self.pick(self.running + self.waiting):
            self.work(num_ahead=0)
            saved = self.pool.get(request.name)
            slots = saved.slots if saved else self.pool._retained.get(request.name, ())
            self.seen["slots of failed loads"] += len(slots)
            self.worker.host[list(slots)] = POISON
            self.planner.release(request.name)
            if request in self.running:
                self.put_back(request)

    def reset(self) -> None:
        """The weights change, and with them the KV of every token."""
        for request in list(self.running):
            self.put_back(request)
        for request in self.waiting:
            request.kv = self.new_kv(request.tenant)
        num_held = self.pool.num_used_slots + self.pool.num_retained_slots
        assert self.planner.drop_all() == num_held
        self.seen["slots dropped"] += num_held

    def finish(self) -> None:
        for request in self.running + self.waiting:
            self.end(request)
        self.work(num_ahead=0)
        self.pool.check()
        assert (self.pool.num_used_slots, self.pool.num_retained_slots) == (0, 0)


@pytest.mark.parametrize(
    ("num_blocks", "num_slots", "fraction", "num_ahead"),
    [(16, 12, 1.0, 0), (24, 20, 0.4, 0), (16, 8, 0.6, 1), (32, 24, 0.5, 1), (12, 14, 0.7, 2), (24, 26, 0.35, 2)],
)
def test_whatever_happens_in_20_000_steps_every_request_reads_the_kv_that_it_wrote(
    num_blocks: int, num_slots: int, fraction: float, num_ahead: int
) -> None:
    engine = Engine(num_slots, num_blocks=num_blocks, num_slots=num_slots, fraction=fraction, num_ahead=num_ahead)
    for _ in range(20_000):
        engine.run_step()
    engine.finish()
    rare = {kind: count for kind, count in engine.seen.items() if count < 100}
    assert rare.keys() <= ({"refused at the cap"} if fraction == 1.0 else set()), f"hardly met: {rare}"


def test_a_load_that_is_executed_after_its_slot_was_filled_anew_is_refused() -> None:
    planner, worker = SwapPlanner(HostBlockPool(1, block_size=BLOCK_SIZE)), Worker(2, 1)
    planner.swap_out("a", tenant="0", num_tokens=1, block_ids=[0])
    worker.execute(Step(plan=planner.take_plan(), out_tenants=[0]))
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=1, block_ids=[0])
    late = planner.take_plan()
    planner.swap_out("b", tenant="0", num_tokens=1, block_ids=[1])
    worker.execute(Step(plan=planner.take_plan(), out_tenants=[0]))
    with pytest.raises(AssertionError, match="a stale slot"):
        worker.execute(Step(plan=late))


def test_a_million_random_blocks_with_partial_tails_come_back_without_one_differing_byte() -> None:
    num_blocks, num_copied, num_differing = 200_000, 0, 0
    rng = np.random.default_rng(0)
    planner = SwapPlanner(HostBlockPool(num_blocks + 50_000, block_size=BLOCK_SIZE))
    worker = Worker(num_blocks, planner.pool.num_slots)
    for turn in range(5):
        worker.device = rng.integers(1, 2**60, (num_blocks, BLOCK_SIZE)) * NUM_TENANTS
        before, sources, targets = worker.device.copy(), rng.permutation(num_blocks), rng.permutation(num_blocks)
        bounds = [0, *np.unique(rng.integers(1, num_blocks, 500)).tolist(), num_blocks]
        requests = [
            (f"{turn}/{first}", slice(first, last), (last - first) * BLOCK_SIZE - int(rng.integers(BLOCK_SIZE)))
            for first, last in pairwise(bounds)
        ]
        for name, part, num_tokens in requests:
            blocks = sources[part].tolist()
            num_copied += planner.swap_out(name, tenant="0", num_tokens=num_tokens, block_ids=blocks) or 0
        plan = planner.take_plan()
        worker.execute(Step(plan=plan, out_tenants=[0] * num_blocks, freed_blocks=list(range(num_blocks))))
        for name, part, num_tokens in requests:
            blocks = targets[part].tolist()
            planner.swap_in(name, num_cached_tokens=0, num_loaded_tokens=num_tokens, block_ids=blocks)
        worker.execute(Step(plan=planner.take_plan()))
        for _, part, num_tokens in requests:
            differing = (before[sources[part]] != worker.device[targets[part]]).reshape(-1)
            num_differing += np.count_nonzero(differing[:num_tokens])
    planner.pool.check()
    assert (num_copied, num_differing) == (1_000_000, 0)
