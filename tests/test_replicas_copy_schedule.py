"""Goal: no order that a GPU may choose among copies and forward passes makes anybody read wrong KV.

Method: a model of the GPU takes operations in the order in which they are enqueued and knows what CUDA promises: a stream
works in order, waits hold for what is enqueued after them, and what the host saw completed is over. It keeps that partial
order as vector clocks and raises `Race` at two accesses to a block or slot, one of them a write, that it leaves open. So a
history without a race has one outcome, the one that the model computes and every forward pass compares. A random engine
produces histories; single rules have situations of their own. Then waits are taken away, and the model must notice.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any

import pytest

from replicas.copy_schedule import (
    Copy,
    CopyScheduler,
    Event,
    Op,
    Pair,
    RecordEvent,
    Run,
    Stream,
    WaitEvent,
    ZeroSlots,
    merge_runs,
)
from replicas.throttled_link import Direction

Clock = dict[Stream, int]
"""How many accesses of each stream come before something."""

Place = tuple[str, int]
Change = Callable[[list[Op]], list[Op]]


class Race(AssertionError):
    """Two accesses in no order, at least one of them a write."""


def block(index: int) -> Place:
    return "block", index


def slot(index: int) -> Place:
    return "slot", index


def out_event(number: int) -> Event:
    return Event(stream=Stream.OUT, number=number)


def advance(clock: Clock, other: Clock) -> None:
    for stream in Stream:
        clock[stream] = max(clock[stream], other[stream])


class Gpu:
    """Device blocks, host slots, and what comes before what."""

    def __init__(self) -> None:
        self.clocks = {stream: dict.fromkeys(Stream, 0) for stream in Stream}
        self.host = dict.fromkeys(Stream, 0)
        self.events: dict[Event, Clock] = {}
        self.last_write: dict[Place, tuple[Stream, int]] = {}
        self.reads_since: dict[Place, Clock] = {}
        self.content: dict[Place, int] = {}

    def enqueue(self, ops: Iterable[Op]) -> None:
        for op in ops:
            if isinstance(op, RecordEvent):
                advance(self.clocks[op.stream], self.host)
                self.events[op.event] = self.clocks[op.stream].copy()
            elif isinstance(op, WaitEvent):
                advance(self.clocks[op.stream], self.events[op.event])
            elif isinstance(op, ZeroSlots):
                self.write(op.stream, {slot(index): 0 for index in op.slots})
            else:
                self.copy(op)

    def copy(self, op: Copy) -> None:
        pairs = [
            (block(run.block + index), slot(run.slot + index)) for run in op.runs for index in range(run.num_blocks)
        ]
        target_of = dict(pairs if op.direction is Direction.OUT else [(slot, block) for block, slot in pairs])
        values = self.read(op.stream, target_of)
        self.write(op.stream, {target_of[source]: value for source, value in values.items()})

    def see_completed(self, event: Event) -> None:
        """The host polls; it keeps no event that is over."""
        advance(self.host, self.events[event])
        self.events = {
            other: clock for other, clock in self.events.items()
            if other.stream is not event.stream or other.number > event.number
        }  # fmt: skip

    def read(self, stream: Stream, places: Iterable[Place]) -> dict[Place, int]:
        clock = self.tick(stream)
        for place in places:
            self.assert_before(clock, place, *self.last_write.get(place, (stream, 0)))
            self.reads_since.setdefault(place, dict.fromkeys(Stream, 0))[stream] = clock[stream]
        return {place: self.content[place] for place in places}

    def write(self, stream: Stream, values: Mapping[Place, int]) -> None:
        clock = self.tick(stream)
        for place in values:
            self.assert_before(clock, place, *self.last_write.get(place, (stream, 0)))
            for reader, number in self.reads_since.pop(place, {}).items():
                self.assert_before(clock, place, reader, number)
            self.last_write[place] = stream, clock[stream]
        self.content.update(values)

    def tick(self, stream: Stream) -> Clock:
        clock = self.clocks[stream]
        advance(clock, self.host)
        clock[stream] += 1
        return clock

    @staticmethod
    def assert_before(clock: Clock, place: Place, stream: Stream, number: int) -> None:
        if clock[stream] < number:
            raise Race(f"access {number} of {stream} to {place} may come later")


# A random engine


@dataclass(eq=False, slots=True)
class Request:
    """A request: its device blocks, its host slots from the first block on, and the KV that its blocks should hold."""

    blocks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    kv: list[int] = field(default_factory=list)


class Engine:
    """A scheduler that does at random what vLLM's may do, and hands freed blocks out at once."""

    def __init__(self, seed: int, change: Change = list, *, num_blocks: int = 20, num_slots: int = 16) -> None:
        self.rng, self.change = random.Random(seed), change
        self.gpu, self.scheduler = Gpu(), CopyScheduler()
        self.free_blocks, self.free_slots = list(range(num_blocks)), list(range(num_slots))
        self.running: list[Request] = []
        self.swapped: list[Request] = []
        self.loading: list[tuple[Event, list[Request]]] = []
        self.pending: dict[Stream, list[Event]] = {Stream.OUT: [], Stream.IN: []}
        self.seen: Counter[str] = Counter()
        self.last_kv = 0

    def run_step(self) -> None:
        for stream in self.pending:
            self.poll(stream)
        for requests in (self.running, self.swapped):
            if requests and self.rng.random() < 0.05:
                self.finish(requests)
        out_pairs, swapped = self.swap_out()
        in_pairs, resumed = self.resume()
        synchronous = self.rng.random() < 0.5
        if synchronous:
            self.running += resumed
        self.swapped += swapped
        written = self.allocate()
        self.execute(out_pairs, in_pairs, synchronous, None if self.rng.random() < 0.1 else written)
        if resumed and not synchronous:
            self.loading.append((self.pending[Stream.IN][-1], resumed))
        for request in resumed:
            num_kept = self.rng.choice([0, len(request.slots) - 1])  # the last block will change
            self.free_slots += request.slots[num_kept:]
            del request.slots[num_kept:]

    def execute(self, outs: list[Pair], ins: list[Pair], synchronous: bool, written: set[int] | None) -> None:
        """Copies in one call, or copies in by themselves, ahead of the forward pass or, where they may be, after it."""
        zero = [slot for _, slot in outs if self.rng.random() < 0.3]
        order = self.rng.choice(["at once", "before", "before" if synchronous else "after"])
        step = partial(self.scheduler.step, synchronous_in=synchronous)
        self.enqueue(step(outs, ins if order == "at once" else [], zero_slots=zero, written_blocks=written))
        if order == "before":
            self.enqueue(step([], ins, written_blocks=()))
        self.forward()
        if order == "after":
            self.enqueue(step([], ins, written_blocks=()))

    def poll(self, stream: Stream) -> None:
        """See some of the stream's events completed, in order."""
        events = self.pending[stream]
        num_completed = self.rng.choice([0, 0, self.rng.randint(0, len(events))])
        if num_completed == 0:
            return
        event = events[num_completed - 1]
        del events[:num_completed]
        self.gpu.see_completed(event)
        self.scheduler.completed(event)
        while stream is Stream.IN and self.loading and self.loading[0][0].number <= event.number:
            self.running += self.loading.pop(0)[1]

    def finish(self, requests: list[Request]) -> None:
        request = requests.pop(self.rng.randrange(len(requests)))
        self.free_blocks += request.blocks
        self.free_slots += request.slots

    def swap_out(self) -> tuple[list[Pair], list[Request]]:
        pairs, swapped = [], []
        for request in self.rng.sample(self.running, min(len(self.running), self.rng.choice([0, 0, 1, 2]))):
            num_kept, num_blocks = len(request.slots), len(request.blocks)
            if num_blocks - num_kept <= len(self.free_slots):
                request.slots += [self.free_slots.pop() for _ in range(num_blocks - num_kept)]
                pairs += list(zip(request.blocks, request.slots, strict=True))[num_kept:]
                self.running.remove(request)
                swapped.append(request)
                self.free_blocks += request.blocks
                request.blocks = []
        return pairs, swapped

    def resume(self) -> tuple[list[Pair], list[Request]]:
        pairs, resumed = [], []
        for request in self.rng.sample(self.swapped, min(len(self.swapped), self.rng.choice([0, 0, 1, 2]))):
            if len(request.slots) <= len(self.free_blocks):
                request.blocks = [self.free_blocks.pop() for _ in request.slots]
                pairs += list(zip(request.blocks, request.slots, strict=True))
                self.swapped.remove(request)
                resumed.append(request)
        return pairs, resumed

    def allocate(self) -> set[int]:
        """Let requests grow and new ones begin."""
        if self.rng.random() < 0.3:
            self.running.append(Request())
        written = set()
        for request in list(self.running):
            if not request.blocks or (len(request.blocks) < 5 and self.rng.random() < 0.2):
                if self.free_blocks:
                    request.blocks.append(self.free_blocks.pop())
                    written.add(request.blocks[-1])
                elif not request.blocks:
                    self.running.remove(request)
        return written

    def enqueue(self, ops: list[Op]) -> None:
        self.scheduler.check()
        self.seen.update(f"{op.stream} waits for {op.event.stream}" for op in ops if isinstance(op, WaitEvent))
        self.seen["overlaps"] += bool(ops) and not any(op.stream is Stream.COMPUTE for op in ops[1:])
        for op in ops:
            if isinstance(op, RecordEvent) and op.stream in self.pending:
                self.pending[op.stream].append(op.event)
        self.gpu.enqueue(self.change(ops))

    def forward(self) -> None:
        """Read the KV of all running requests; write their last blocks."""
        for request in self.running:
            blocks = [block(index) for index in request.blocks]
            values = self.gpu.read(Stream.COMPUTE, blocks[: len(request.kv)])
            assert list(values.values()) == request.kv, "somebody else's KV"
            first_written = max(0, len(request.kv) - 1)
            num_written = len(blocks) - first_written
            request.kv[first_written:] = range(self.last_kv + 1, self.last_kv + 1 + num_written)
            self.last_kv += num_written
            written = zip(blocks[first_written:], request.kv[first_written:], strict=True)
            self.gpu.write(Stream.COMPUTE, dict(written))


def run(engine: Engine, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.run_step()


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_have_no_race_and_every_forward_pass_reads_what_was_written(seed: int) -> None:
    engine = Engine(seed)
    run(engine, 4000)
    assert len(engine.seen) == 7
    assert min(engine.seen.values()) > 100, engine.seen


def without(waiter: Stream, stream: Stream) -> Change:
    def change(ops: list[Op]) -> list[Op]:
        waits = [op for op in ops if isinstance(op, WaitEvent) and (op.stream, op.event.stream) == (waiter, stream)]
        return [op for op in ops if op not in waits]

    return change


CHANGES: dict[str, Change] = {
    f"{waiter} does not wait for {stream}": without(waiter, stream) for waiter, stream in permutations(Stream, 2)
}
CHANGES["events are recorded too early"] = lambda ops: sorted(ops, key=lambda op: not isinstance(op, RecordEvent))
CHANGES["copies are enqueued too early"] = lambda ops: sorted(ops, key=lambda op: not isinstance(op, Copy))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_model_finds_a_race_in_changed_histories(change: Change) -> None:
    with pytest.raises(Race):
        run(Engine(0, change), 4000)


def test_the_model_finds_zeros_that_were_written_after_the_copy() -> None:
    engine = Engine(0, lambda ops: sorted(ops, key=lambda op: isinstance(op, ZeroSlots)))
    with pytest.raises(AssertionError, match="somebody else's KV"):
        run(engine, 4000)


# Single rules


class Script:
    """A GPU whose blocks 0 to 3 were just computed; slots 0 and 1 were filled long ago."""

    def __init__(self, dropped: int | None = None) -> None:
        """Prepare all that; then one wait may be left out, by number."""
        self.gpu, self.scheduler = Gpu(), CopyScheduler()
        self.waits: list[WaitEvent] = []
        self.dropped: int | None = None
        self.step(writes=range(4))
        self.step(outs=[(0, 0), (1, 1)])
        self.complete(Stream.OUT, 1)
        self.step(writes=range(4))
        self.waits, self.dropped = [], dropped

    def step(
        self, outs: Sequence[Pair] = (), ins: Sequence[Pair] = (), *, asynchronous: bool = False,
        zero: Sequence[int] = (), writes: Sequence[int] = (), unknown: bool = False,
    ) -> list[Event]:  # fmt: skip
        """Plan and enqueue the copies and a forward pass that writes blocks; return what that one waits for."""
        written = None if unknown else writes
        ops = self.scheduler.step(outs, ins, synchronous_in=not asynchronous, zero_slots=zero, written_blocks=written)
        for op in ops:
            if isinstance(op, WaitEvent):
                self.waits.append(op)
            if not isinstance(op, WaitEvent) or len(self.waits) - 1 != self.dropped:
                self.gpu.enqueue([op])
        self.gpu.write(Stream.COMPUTE, {block(index): 1 for index in writes})
        return [op.event for op in ops if isinstance(op, WaitEvent) and op.stream is Stream.COMPUTE]

    def complete(self, stream: Stream, number: int) -> None:
        event = Event(stream=stream, number=number)
        self.gpu.see_completed(event)
        self.scheduler.completed(event)


OUT = {"outs": [(0, 2)], "writes": [1]}
LOAD = {"ins": [(0, 0)], "asynchronous": True, "writes": [1]}
SITUATIONS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "a block is copied out and written": (2, [{"outs": [(0, 2)], "writes": [0]}]),
    "a block is copied out and written later": (2, [OUT, {"writes": [0, 1]}]),
    "a block is copied out and anything written": (2, [{"outs": [(0, 2)], "writes": [0], "unknown": True}]),
    "a block is copied out and loaded into": (4, [OUT, {"ins": [(0, 0), (1, 1)]}, {"writes": [1]}]),
    "a slot is filled and loaded from": (4, [OUT, {"ins": [(1, 2)]}, {"writes": [1]}]),
    "a slot is loaded from and filled": (3, [LOAD, {"outs": [(1, 0)]}]),
    "a slot is loaded from and zeroed": (3, [LOAD, {"outs": [(1, 2)], "zero": [0]}]),
}


@pytest.mark.parametrize(("num_waits", "steps"), SITUATIONS.values(), ids=SITUATIONS)
def test_a_situation_is_safe_and_every_one_of_its_waits_is_needed(num_waits: int, steps: list[dict[str, Any]]) -> None:
    def play(script: Script) -> int:
        for step in steps:
            script.step(**step)
        return len(script.waits)

    assert play(Script()) == num_waits
    for dropped in range(num_waits):
        with pytest.raises(Race):
            play(Script(dropped))


def test_an_asynchronous_load_delays_no_forward_pass_and_is_over_when_the_host_has_seen_its_event() -> None:
    script = Script()
    assert script.step(ins=[(0, 0), (1, 1)], asynchronous=True) == []
    with pytest.raises(Race):
        script.gpu.read(Stream.COMPUTE, [block(0)])
    script.complete(Stream.IN, 1)
    assert script.step(writes=[0, 1]) == []


@pytest.mark.parametrize("use", [{"outs": [(0, 2)]}, {"ins": [(0, 1)]}, {"writes": [0]}], ids=str)
def test_a_block_must_not_be_used_while_it_is_being_loaded(use: dict[str, Any]) -> None:
    script = Script()
    script.step(ins=[(0, 0)], asynchronous=True)
    with pytest.raises(AssertionError, match="while it is being loaded"):
        script.step(**use)


def test_a_forward_pass_waits_only_for_the_copies_of_blocks_that_it_writes_and_only_once() -> None:
    script = Script()
    assert script.step(outs=[(0, 2)], writes=[2, 3]) == []
    assert script.step(outs=[(1, 3)], writes=[2, 3]) == []
    assert script.step(writes=[0]) == [out_event(2)]
    assert script.step(writes=[0]) == []
    assert script.step(unknown=True) == [out_event(3)]


def test_nothing_waits_for_a_completed_event() -> None:
    script = Script()
    script.step(outs=[(0, 2), (1, 3)])
    script.complete(Stream.OUT, 2)
    assert script.step(writes=[0]) == script.step(unknown=True) == []
    script.step(ins=[(1, 2)])
    assert out_event(2) not in [wait.event for wait in script.waits]


def test_slots_are_zeroed_on_the_device_before_they_are_filled() -> None:
    ops = CopyScheduler().step([(4, 0), (5, 1)], [], synchronous_in=True, zero_slots=[1], written_blocks=())
    compute = Event(stream=Stream.COMPUTE, number=1)
    assert ops == [
        RecordEvent(event=compute),
        WaitEvent(stream=Stream.OUT, event=compute),
        ZeroSlots(slots=(1,)),
        Copy(direction=Direction.OUT, runs=(Run(block=4, slot=0, num_blocks=2),)),
        RecordEvent(event=out_event(1)),
    ]
    assert {op.stream for op in ops[1:]} == {Stream.OUT}


def test_slots_are_zeroed_where_nothing_is_filled() -> None:
    ops = CopyScheduler().step([], [], synchronous_in=True, zero_slots=[3, 1], written_blocks=())
    assert [type(op) for op in ops] == [RecordEvent, WaitEvent, ZeroSlots, RecordEvent]
    assert ZeroSlots(slots=(3, 1)) in ops


def test_of_completed_copies_nothing_is_remembered() -> None:
    script = Script()
    script.step(outs=[(0, 2)], ins=[(1, 0)], zero=[2])
    script.step(ins=[(2, 1)], asynchronous=True)
    script.complete(Stream.OUT, 2)
    script.complete(Stream.IN, 2)
    remembered = script.scheduler
    assert remembered._out_of_block == remembered._out_of_slot == {}
    assert remembered._in_of_block == remembered._in_of_slot == {}


def test_a_step_without_copies_plans_nothing() -> None:
    assert CopyScheduler().step([], [], synchronous_in=True) == []


def test_two_copies_of_a_batch_have_different_targets() -> None:
    with pytest.raises(AssertionError, match="two blocks into one slot"):
        Script().step(outs=[(0, 2), (1, 2)])
    with pytest.raises(AssertionError, match="two slots into one block"):
        Script().step(ins=[(0, 0), (0, 1)])


def test_an_event_that_was_never_recorded_cannot_be_completed() -> None:
    with pytest.raises(AssertionError, match="never recorded"):
        CopyScheduler().completed(out_event(1))


@pytest.mark.parametrize(
    ("pairs", "runs"),
    [
        ([], []),
        ([(3, 0), (4, 1), (5, 2)], [(3, 0, 3)]),
        ([(3, 0), (4, 2), (6, 3)], [(3, 0, 1), (4, 2, 1), (6, 3, 1)]),
        ([(3, 0), (2, 1), (3, 2)], [(3, 0, 1), (2, 1, 2)]),
    ],
)
def test_neighbours_on_both_sides_are_copied_as_one_run(pairs: list[Pair], runs: list[tuple[int, int, int]]) -> None:
    assert [(run.block, run.slot, run.num_blocks) for run in merge_runs(pairs)] == runs
