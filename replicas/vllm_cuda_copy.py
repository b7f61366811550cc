"""Runs the copies that `CopyScheduler` has planned on CUDA streams (shell; nothing is decided here).

Rules:
- Operations are enqueued in the plan's order; the host never waits for the device. Events are polled once a step.
- Host rows are pinned, so that a copy needs no staging buffer and runs beside kernels.
"""

from collections.abc import Collection, Sequence

import torch

from replicas.copy_schedule import Copy, CopyScheduler, Event, Op, Pair, RecordEvent, Stream, WaitEvent, ZeroSlots
from replicas.throttled_link import Direction
from replicas.transfer import Carried, Transfer, TransferLog


class CudaCopies:
    """Streams and events of one worker."""

    def __init__(self, device_rows: Sequence[torch.Tensor], host_rows: Sequence[torch.Tensor]) -> None:
        """Take the rows of blocks and of slots, layer by layer: uint8, of shapes (blocks, bytes) and (slots, bytes)."""
        self._rows = list(zip(device_rows, host_rows, strict=True))
        self._scheduler = CopyScheduler()
        self._side = {stream: torch.cuda.Stream() for stream in (Stream.OUT, Stream.IN)}
        self._zeros = [torch.zeros_like(rows[0]) for rows in device_rows]
        self._events: dict[Event, torch.cuda.Event] = {}
        self._began = torch.cuda.Event(enable_timing=True)
        """What the times of transfers count from."""
        self._began.record()
        self._under_way: list[tuple[Copy, torch.cuda.Event, torch.cuda.Event]] = []
        self._log = TransferLog()
        self._carried: list[Carried] = []

    def copy_out(
        self, pairs: Sequence[Pair], *, zero_slots: Sequence[int], written_blocks: Collection[int] | None
    ) -> None:
        """Enqueue copies out; to be called in every step, before the compute stream is given anything that writes."""
        self._poll()
        self._run(
            self._scheduler.step(pairs, [], synchronous_in=True, zero_slots=zero_slots, written_blocks=written_blocks)
        )

    def copy_in(self, pairs: Sequence[Pair], *, synchronous: bool) -> Event:
        """Enqueue copies in; return the event that ends them.

        Args:
            synchronous: What the compute stream is given from here on comes after them. Else nothing may use the blocks
                before the event is done.
        """
        ops = self._scheduler.step([], pairs, synchronous_in=synchronous, written_blocks=())
        self._run(ops)
        return max((op.event for op in ops if isinstance(op, RecordEvent)), key=lambda event: event.stream is Stream.IN)

    def is_done(self, event: Event) -> bool:
        """Whether the copies that the event ends are complete."""
        self._poll()
        return event not in self._events

    def take_transfers(self) -> list[Carried]:
        """Return what the transfers tell that were complete at the last poll, once."""
        carried, self._carried = self._carried, []
        return carried

    def _poll(self) -> None:
        under_way, self._under_way = self._under_way, []
        done = []
        for copy, begin, end in under_way:
            if end.query():
                start_s, end_s = (self._began.elapsed_time(event) / 1e3 for event in (begin, end))
                num_blocks = sum(run.num_blocks for run in copy.runs)
                done.append(Transfer(direction=copy.direction, num_blocks=num_blocks, start_s=start_s, end_s=end_s))
            else:
                self._under_way.append((copy, begin, end))
        self._carried += self._log.add(done)
        for event in [event for event in self._events if event.stream is not Stream.COMPUTE]:
            if self._events[event].query():
                self._scheduler.completed(event)
                del self._events[event]

    def _run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            stream = self._side.get(op.stream) or torch.cuda.current_stream()
            match op:
                case RecordEvent():
                    self._events[op.event] = torch.cuda.Event()
                    self._events[op.event].record(stream)
                case WaitEvent():
                    stream.wait_event(self._events[op.event])
                case Copy():
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    with torch.cuda.stream(stream):
                        begin.record()
                        self._copy(op)
                        end.record()
                    self._under_way.append((op, begin, end))
                case ZeroSlots():
                    with torch.cuda.stream(stream):
                        self._zero(op.slots)
        for event in [event for event in self._events if event.stream is Stream.COMPUTE]:
            del self._events[event]  # waits for it are enqueued, and nothing asks for it again

    def _copy(self, op: Copy) -> None:
        for device, host in self._rows:
            for run in op.runs:
                blocks = device[run.block : run.block + run.num_blocks]
                slots = host[run.slot : run.slot + run.num_blocks]
                if op.direction is Direction.OUT:
                    slots.copy_(blocks, non_blocking=True)
                else:
                    blocks.copy_(slots, non_blocking=True)

    def _zero(self, slots: Sequence[int]) -> None:
        for (_, host), zeros in zip(self._rows, self._zeros, strict=True):
            for slot in slots:
                host[slot].copy_(zeros, non_blocking=True)
