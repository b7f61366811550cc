"""Streams and events of a GPU's KV block copies, as a plan that can be checked without a GPU.

Rules:
- Three streams: compute (forward passes, the engine's own), out and in (copies, one stream per direction of the link). A
  stream works in order, and nothing but events orders one stream after another. The host never waits.
- A copy out waits for all that compute was given before it, which wrote the block. Compute waits for a copy out only when
  it is about to write the block: until then, copies out and forward passes overlap.
- A copy in waits for all that compute was given before it, which may still use the block, for the copy out that reads the
  block, and for the copy out that filled the slot.
- Compute waits for a synchronous copy in at once. The blocks of an asynchronous one are nobody's until the host has seen
  its event completed.
- A slot is filled or zeroed after the last copy in that reads it. Zeros come from the device, in the out stream's order: the
  host could write them only after waiting for the copies that use the slot.
- No stream waits twice for an event, or for one that is completed. What was completed on a stream is forgotten, so the
  state is bounded by the copies under way.

Source: CUDA's stream semantics. A wait holds up what its stream is given later, until all that the other stream was given
before the record is done; and what the host launches after it saw an event completed comes after that event.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise, product

from replicas.throttled_link import Direction

Pair = tuple[int, int]
"""A device block and a host slot."""


class Stream(StrEnum):
    """A queue of device work that is done in order."""

    COMPUTE = "compute"
    OUT = "out"
    IN = "in"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A point in a stream, recorded once; numbers of a stream's events rise from 1 on."""

    stream: Stream
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring blocks and the neighbouring slots that belong to them."""

    block: int
    slot: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordEvent:
    """Record the event in its stream."""

    event: Event

    @property
    def stream(self) -> Stream:
        return self.event.stream


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitEvent:
    """Let the stream wait for an event of another one."""

    stream: Stream
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Copy blocks to slots or slots to blocks; the runs in any order."""

    direction: Direction
    runs: tuple[Run, ...]

    @property
    def stream(self) -> Stream:
        return Stream.OUT if self.direction is Direction.OUT else Stream.IN


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSlots:
    """Copy a device-resident row of zeros to each of the slots."""

    slots: tuple[int, ...]

    @property
    def stream(self) -> Stream:
        return Stream.OUT


Op = RecordEvent | WaitEvent | Copy | ZeroSlots


def merge_runs(pairs: Sequence[Pair]) -> list[Run]:
    """Join pairs that are neighbours in the list, on the device and on the host, into runs."""
    starts = [
        index for index, (block, slot) in enumerate(pairs) if index == 0 or pairs[index - 1] != (block - 1, slot - 1)
    ]
    return [
        Run(block=pairs[start][0], slot=pairs[start][1], num_blocks=end - start)
        for start, end in pairwise([*starts, len(pairs)])
    ]


class CopyScheduler:
    """Plans each step's copies, and remembers which event guards each block and slot."""

    def __init__(self) -> None:
        self._recorded = dict.fromkeys(Stream, 0)
        """Number of each stream's last event."""
        self._completed = dict.fromkeys(Stream, 0)
        self._waited = dict.fromkeys(product(Stream, Stream), 0)
        """By (who waits, for whom): the last event that was waited for."""
        # Numbers of the last events not completed, by block or slot.
        self._out_of_block: dict[int, int] = {}
        self._out_of_slot: dict[int, int] = {}
        self._in_of_slot: dict[int, int] = {}
        self._in_of_block: dict[int, int] = {}  # asynchronous ones

    def step(
        self,
        out_pairs: Sequence[Pair],
        in_pairs: Sequence[Pair],
        *,
        synchronous_in: bool,
        zero_slots: Sequence[int] = (),
        written_blocks: Collection[int] | None = None,
    ) -> list[Op]:
        """Plan copies out, then copies in, between what compute was given so far and what it is given next.

        To be called in every step. A step may also call once per direction, each time where the copies are enqueued.

        Args:
            zero_slots: Slots to be zeroed before anything is copied.
            written_blocks: Blocks that were allocated to what compute is given before the next call; it writes no other
                block that a copy out may still read. None: unknown, so it waits for all copies out.

        Returns:
            Operations to enqueue in this order. The event recorded on `Stream.IN` ends the copies in. Events of copies
            must be kept until `completed` was told of them, those of compute only while this list is enqueued.
        """
        ops: list[Op] = []
        if out_pairs or in_pairs or zero_slots:
            ops.append(self._record(Stream.COMPUTE))
        if out_pairs or zero_slots:
            ops += self._copy_out(out_pairs, zero_slots)
        if in_pairs:
            ops += self._copy_in(in_pairs, synchronous=synchronous_in)
        if written_blocks is None:
            last_read = self._recorded[Stream.OUT]
        else:
            self._assert_not_loading(written_blocks)
            last_read = _last_event(self._out_of_block, written_blocks)
        return ops + self._wait(Stream.COMPUTE, Stream.OUT, last_read)

    def completed(self, event: Event) -> None:
        """The host has seen that the event, and so every earlier one of its stream, is completed."""
        stream, number = event.stream, event.number
        assert 1 <= number <= self._recorded[stream], f"{event} was never recorded"
        self._completed[stream] = max(self._completed[stream], number)
        for guards in self._guards(stream):
            for key in [key for key, guard in guards.items() if guard <= number]:
                del guards[key]

    def check(self) -> None:
        """Assert that every guard is an event that was recorded and is not completed."""
        for stream in Stream:
            assert self._completed[stream] <= self._recorded[stream], f"{stream} completed more than it recorded"
            for waiter in Stream:
                assert self._waited[waiter, stream] <= self._recorded[stream], (
                    f"{waiter} waits for no event of {stream}"
                )
            for guards in self._guards(stream):
                for key, number in guards.items():
                    assert self._completed[stream] < number <= self._recorded[stream], f"event {number} guards {key}"

    def _copy_out(self, pairs: Sequence[Pair], zero_slots: Sequence[int]) -> list[Op]:
        blocks, slots = [block for block, _ in pairs], [slot for _, slot in pairs]
        assert len(set(slots)) == len(slots), "two blocks into one slot"
        self._assert_not_loading(blocks)
        overwritten = [*slots, *zero_slots]
        ops = self._wait(Stream.OUT, Stream.COMPUTE, self._recorded[Stream.COMPUTE])
        ops += self._wait(Stream.OUT, Stream.IN, _last_event(self._in_of_slot, overwritten))
        if zero_slots:
            ops.append(ZeroSlots(slots=tuple(zero_slots)))
        if pairs:
            ops.append(Copy(direction=Direction.OUT, runs=tuple(merge_runs(pairs))))
        ops.append(self._record(Stream.OUT))
        number = self._recorded[Stream.OUT]
        self._out_of_block.update(dict.fromkeys(blocks, number))
        self._out_of_slot.update(dict.fromkeys(overwritten, number))
        return ops

    def _copy_in(self, pairs: Sequence[Pair], *, synchronous: bool) -> list[Op]:
        blocks, slots = [block for block, _ in pairs], [slot for _, slot in pairs]
        assert len(set(blocks)) == len(blocks), "two slots into one block"
        self._assert_not_loading(blocks)
        last_out = max(_last_event(self._out_of_slot, slots), _last_event(self._out_of_block, blocks))
        ops = self._wait(Stream.IN, Stream.COMPUTE, self._recorded[Stream.COMPUTE])
        ops += self._wait(Stream.IN, Stream.OUT, last_out)
        ops += [Copy(direction=Direction.IN, runs=tuple(merge_runs(pairs))), self._record(Stream.IN)]
        number = self._recorded[Stream.IN]
        self._in_of_slot.update(dict.fromkeys(slots, number))
        if synchronous:
            return ops + self._wait(Stream.COMPUTE, Stream.IN, number)
        self._in_of_block.update(dict.fromkeys(blocks, number))
        return ops

    def _record(self, stream: Stream) -> RecordEvent:
        self._recorded[stream] += 1
        return RecordEvent(event=Event(stream=stream, number=self._recorded[stream]))

    def _wait(self, waiter: Stream, stream: Stream, number: int) -> list[Op]:
        """Let `waiter` wait for a stream's event, 0 being none, unless it already comes after it."""
        if number <= max(self._waited[waiter, stream], self._completed[stream]):
            return []
        self._waited[waiter, stream] = number
        return [WaitEvent(stream=waiter, event=Event(stream=stream, number=number))]

    def _guards(self, stream: Stream) -> tuple[dict[int, int], ...]:
        """What events of the stream guard."""
        return {
            Stream.COMPUTE: (),
            Stream.OUT: (self._out_of_block, self._out_of_slot),
            Stream.IN: (self._in_of_block, self._in_of_slot),
        }[stream]

    def _assert_not_loading(self, blocks: Collection[int]) -> None:
        assert not _last_event(self._in_of_block, blocks), "a block is used while it is being loaded"


def _last_event(guards: dict[int, int], keys: Iterable[int]) -> int:
    """Number of the last event that guards any of the blocks or slots; 0 where none does."""
    return max((guards.get(key, 0) for key in keys), default=0) if guards else 0
