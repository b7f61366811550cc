"""The worker's half of `SwapConnector`: executes plans on one worker's memory.

Rule: a block is loaded only from a slot that holds what was saved: its copy out was complete, its generation is the one
that is asked for, and where checksums are verified its bytes are the same. Everything else is reported block by block, so
that vLLM recomputes those tokens.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from replicas.swap_planner import SwapPlan
from replicas.throttled_link import Direction
from replicas.transfer import Carried
from replicas.vllm_block_copy import BlockCopier, CopySpeeds
from replicas.vllm_internals import KVConnectorWorkerMetadata

logger = logging.getLogger(__name__)


@dataclass
class SwapReport(KVConnectorWorkerMetadata):
    """What one step's copies took, from every worker to the scheduler."""

    num_blocks: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))
    seconds: dict[Direction, float] = field(default_factory=lambda: dict.fromkeys(Direction, 0.0))

    failed_slots: list[int] = field(default_factory=list)
    """Slots whose copy out failed, or that were not whole when they were to be loaded."""
    transfers: list[Carried] = field(default_factory=list)
    """What ran beside the engine and is complete."""
    speeds: CopySpeeds | None = None
    """In the first report: what copies take, measured at start."""

    def __bool__(self) -> bool:
        return any(self.num_blocks.values()) or bool(self.failed_slots or self.transfers) or self.speeds is not None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Self:
        """All workers copy the same blocks, each its own part of them; the slowest one counts."""
        assert isinstance(other, SwapReport), type(other)
        assert self.num_blocks == other.num_blocks, "two workers copied different blocks"
        seconds = {direction: max(self.seconds[direction], other.seconds[direction]) for direction in Direction}
        failed, transfers = self.failed_slots + other.failed_slots, self.transfers + other.transfers
        return type(self)(self.num_blocks, seconds, failed, transfers, self.speeds)


class SwapWorker:
    """Executes plans on one worker's memory, and knows what every slot really holds."""

    def __init__(self, copier: BlockCopier, *, verify_checksums: bool) -> None:
        self._copier, self._verify = copier, verify_checksums
        self._filled: dict[int, tuple[int, int]] = {}
        """Generation and checksum (0 where none is wanted) of the slots whose copy out was complete."""
        self._loads: dict[str, tuple[float, Callable[[], bool]]] = {}
        """Asynchronous loads: from when on they may count as done, and whether their copies are."""
        self._failed_blocks: set[int] = set()
        self._report = SwapReport(speeds=copier.measure())

    def copy_out(self, plan: SwapPlan, written_blocks: Sequence[int] | None) -> None:
        self._copier.begin_step(written_blocks)
        if not plan.out_blocks:
            self._copier.copy_out([], [])
            return
        for slot in plan.out_slots:
            self._filled.pop(slot, None)
        with self._timed(Direction.OUT, len(plan.out_blocks)):
            if plan.zero_slots:
                self._copier.zero(plan.zero_slots)
            if not self._done(lambda: self._copier.copy_out(plan.out_blocks, plan.out_slots), Direction.OUT):
                self._report.failed_slots += plan.out_slots
                return
            for slot, generation in zip(plan.out_slots, plan.out_generations, strict=True):
                self._filled[slot] = (generation, self._copier.checksum(slot) if self._verify else 0)

    def copy_in(self, plan: SwapPlan, loads: Sequence[tuple[str, float]]) -> None:
        if plan.in_blocks:
            with self._timed(Direction.IN, len(plan.in_blocks)):
                is_done = self._load(plan, synchronous=not loads)
            self._loads.update({request_id: (done_s, is_done) for request_id, done_s in loads})

    def _load(self, plan: SwapPlan, *, synchronous: bool) -> Callable[[], bool]:
        """Copy in what is whole; blocks of other slots are reported, so that vLLM recomputes their tokens."""
        whole: list[tuple[int, int, int]] = []
        lost: list[tuple[int, int, int]] = []
        for pair in zip(plan.in_slots, plan.in_blocks, plan.in_generations, strict=True):
            (whole if self._is_whole(pair[0], pair[2]) else lost).append(pair)
        slots, blocks = [pair[0] for pair in whole], [pair[1] for pair in whole]
        tells: list[Callable[[], bool]] = []

        def copy_in() -> None:
            tells.append(self._copier.copy_in(slots, blocks, synchronous=synchronous))

        if whole and not self._done(copy_in, Direction.IN):
            lost += whole
        if lost:
            logger.warning("%d KV blocks could not be loaded from host memory; their tokens are recomputed.", len(lost))
            self._report.failed_slots += [slot for slot, _, _ in lost]
            self._failed_blocks.update(block for _, block, _ in lost)
        return tells[0] if tells else lambda: True

    def _is_whole(self, slot: int, generation: int) -> bool:
        filled, checksum = self._filled.get(slot, (-1, 0))
        return filled == generation and (not self._verify or checksum == self._copier.checksum(slot))

    def _done(self, copy: Callable[[], None], direction: Direction) -> bool:
        try:
            copy()
        except (OSError, MemoryError, RuntimeError) as error:
            logger.warning("A copy of KV blocks (%s) failed: %s", direction, error)
            return False
        return True

    @contextmanager
    def _timed(self, direction: Direction, num_blocks: int) -> Iterator[None]:
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._report.num_blocks[direction] += num_blocks
            self._report.seconds[direction] += time.monotonic() - start_s

    def take_report(self) -> SwapReport:
        report, self._report = self._report, SwapReport()
        report.transfers += self._copier.take_transfers()
        return report

    def take_finished(self, now_s: float) -> set[str]:
        done = {name for name, (done_s, is_done) in self._loads.items() if done_s <= now_s and is_done()}
        for request_id in done:
            del self._loads[request_id]
        return done

    def take_failed_blocks(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed
