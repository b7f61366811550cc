"""What each preemption has really cost, in the unit of its prediction: seconds of engine time (`replicas.preemption_cost`).

Rules:
- A recomputation costs what the steps that prefill its tokens again take longer than steps of as many decodes without any
  prefill; prefills that share a step share the extra time by their tokens.
- A swap costs the copies' own seconds, a part of the pool that lies idle while its blocks load, and the victim's wait for
  the link divided by the running requests.
- Every preemption opens one record; it ends measured, or forgotten (aborted, reset, loaded in vain). Copies are reported
  in the order in which they were planned, also those of requests that are gone by then.
- No clock: seconds come in as values.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from cost_service.samples import CopySample, LinkSample, PrefillSample, Sample
from replicas.preemption import Action, PreemptionDecision
from replicas.throttled_link import Direction

DECAY = 0.98
"""Weight of a step in the baseline of decode steps, per step since."""

EXCESS_DECAY = 0.97
"""What is left of the swaps' excess with every recomputation: without swaps nothing else would bring it down."""

RESUME_WEIGHT = 0.1
"""Weight of the newest victim in what is remembered of them."""

MAX_SAMPLES = 512
"""Samples that wait to be fetched; older ones go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One preemption, predicted and measured."""

    request_id: str
    action: Action
    predicted_s: float
    alternative_s: float
    """What the other action was predicted to cost."""
    measured_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Tokens of one request's prefill in one step."""

    request_id: str
    first: int
    """Tokens that it had before."""
    num_tokens: int


@dataclass(slots=True)
class _Record:
    decision: PreemptionDecision
    num_tokens: int
    num_running: int
    since_s: float
    resumed: bool = False
    measured_s: float = 0.0


class PreemptionMeter:
    """Follows preemptions from the decision to the last second that they cost."""

    def __init__(self) -> None:
        self._open: dict[str, _Record] = {}
        self._copies: dict[Direction, deque[tuple[str, int]]] = {direction: deque() for direction in Direction}
        self._decodes = _Line()
        self._done: list[Measurement] = []
        self.step_copies_s = 0.0
        """Of copies that the engine waited for in the step under way."""

        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self.resume_wait_s = 0.0
        """Seconds between preemption and having blocks again, mean of the last victims."""
        self.swap_excess_s = 0.0
        """What the last swaps took beyond their price."""
        self.survival = 0.0
        """Share of their tokens that the last victims found in the prefix cache when they came back."""

    @property
    def num_open(self) -> int:
        """Preemptions that are not measured yet."""
        return len(self._open)

    def preempted(
        self,
        decision: PreemptionDecision,
        *,
        now_s: float,
        num_tokens: int,
        num_running: int,
        num_copied_blocks: int = 0,
    ) -> None:
        """Open a record; of one that is open (preempted again before it was back) nothing is told.

        Args:
            num_tokens: Tokens that the victim had in its blocks.
            num_copied_blocks: Blocks whose copy to host memory was planned for it.
        """
        assert num_running > 0, "a preemption without running requests"
        if decision.action is Action.RECOMPUTE:
            self.swap_excess_s *= EXCESS_DECAY
        self._open[decision.request_id] = _Record(decision, num_tokens, num_running, now_s)
        self._plan(Direction.OUT, decision.request_id, num_copied_blocks)

    def resumed(self, request_id: str, now_s: float, *, num_cached_tokens: int) -> None:
        """The request has blocks again; so many tokens were still in the prefix cache."""
        record = self._open.get(request_id)
        if record is not None and not record.resumed:
            record.resumed = True
            self.resume_wait_s += RESUME_WEIGHT * (now_s - record.since_s - self.resume_wait_s)
            if record.num_tokens > 0:
                self.survival += RESUME_WEIGHT * (min(1.0, num_cached_tokens / record.num_tokens) - self.survival)

    def loading(
        self, request_id: str, *, num_blocks: int, num_pool_blocks: int, held_s: float = 0.0, waited_s: float = 0.0
    ) -> None:
        """A swapped-out request has its blocks again and loads `num_blocks` of them; with 0 its record ends here.

        Args:
            held_s: Seconds for which the blocks are held before they can be used.
            waited_s: Seconds for which the request waited for the link, those included.
        """
        record = self._open.get(request_id)
        if record is not None:
            record.measured_s += num_blocks / num_pool_blocks * held_s + waited_s / record.num_running
        self._plan(Direction.IN, request_id, num_blocks)
        if num_blocks == 0:
            self._finish(request_id)

    def copied(self, direction: Direction, num_blocks: int, seconds: float) -> None:
        """Copies have ended that took so long together: the oldest planned ones of that direction."""
        self.step_copies_s += seconds
        self._samples.append(CopySample(direction=direction.value, num_blocks=num_blocks, seconds=seconds))
        queue, left = self._copies[direction], num_blocks
        while left > 0:
            request_id, planned = queue.popleft()
            assert planned <= left, f"{left} copies {direction} reported of {planned} planned for one request"
            left -= planned
            if (record := self._open.get(request_id)) is not None and record.decision.action is Action.SWAP:
                record.measured_s += seconds * planned / num_blocks
                if direction is Direction.IN:
                    self._finish(request_id)

    def transferred(self, direction: Direction, num_blocks: int, seconds: float, *, shared: float = 0.0) -> None:
        """A transfer beside the engine took so long from when the link was free for it.

        Args:
            shared: Share of that time for which the other direction carried something too.
        """
        self._samples.append(
            LinkSample(direction=direction.value, num_blocks=num_blocks, shared=shared, seconds=seconds)
        )

    def step(self, seconds: float, *, num_decodes: int, prefills: Sequence[Prefill]) -> float | None:
        """A step of a busy engine has ended; the copies reported since the last one ran within it.

        Returns:
            Seconds that its prefills took; None for a step without any, or while there is nothing to compare with.
        """
        seconds, self.step_copies_s = seconds - self.step_copies_s, 0.0
        if not prefills:
            if num_decodes:
                self._decodes.add(num_decodes, seconds)
            return None
        extra_s = seconds - self._decodes.at(num_decodes) if self._decodes.known else math.nan
        total = sum(prefill.num_tokens for prefill in prefills)
        for prefill in prefills:
            record = self._open.get(prefill.request_id)
            if record is None or record.decision.action is not Action.RECOMPUTE:
                continue
            end = prefill.first + prefill.num_tokens
            again = max(0, min(end, record.num_tokens) - prefill.first)
            record.measured_s += extra_s * again / total
            if end >= record.num_tokens:
                self._finish(prefill.request_id)
        if not math.isfinite(extra_s):
            return None
        attention = float(sum((one.first + one.num_tokens) ** 2 - one.first**2 for one in prefills))
        self._samples.append(
            PrefillSample(num_tokens=total, attention=attention, num_decodes=num_decodes, seconds=extra_s)
        )
        return extra_s

    def quiet_steps(self, seconds: Sequence[float], *, num_decodes: int) -> None:
        """Steps of decodes alone have ended, in which nothing was copied: as many calls of `step` would."""
        assert self.step_copies_s == 0.0, "copies in a quiet step"
        if num_decodes:
            self._decodes.add_all(num_decodes, seconds)

    def forget(self, request_id: str) -> None:
        """The request has finished or was aborted, or what it costs cannot be told."""
        self._open.pop(request_id, None)

    def forget_all(self) -> None:
        """Everything was reset; planned copies are still reported."""
        self._open.clear()

    def take(self) -> list[Measurement]:
        """Return what was measured since the last call."""
        done, self._done = self._done, []
        return done

    def take_samples(self) -> list[Sample]:
        """Return what costs can be learned from, since the last call."""
        samples = list(self._samples)
        self._samples.clear()
        return samples

    def check(self) -> None:
        """Assert that records and planned copies make sense."""
        assert all(num_blocks > 0 for queue in self._copies.values() for _, num_blocks in queue), "an empty copy"
        assert self.resume_wait_s >= 0.0, f"victims waited for {self.resume_wait_s} s"
        assert 0.0 <= self.survival <= 1.0, f"a share of {self.survival} survived"

    def _plan(self, direction: Direction, request_id: str, num_blocks: int) -> None:
        if num_blocks:
            self._copies[direction].append((request_id, num_blocks))

    def _finish(self, request_id: str) -> None:
        record = self._open.pop(request_id, None)
        if record is not None and math.isfinite(record.measured_s):  # else there was nothing to compare with
            prices, action = record.decision.prices, record.decision.action
            predicted_s, alternative_s = prices.swap_s, prices.recompute_s
            if action is Action.SWAP:
                excess_s = record.measured_s - predicted_s + prices.terms_s.get("swap_excess", 0.0)
                self.swap_excess_s += RESUME_WEIGHT * (max(0.0, excess_s) - self.swap_excess_s)
            if action is Action.RECOMPUTE:
                predicted_s, alternative_s = alternative_s, predicted_s
            measurement = Measurement(
                request_id=request_id,
                action=action,
                predicted_s=predicted_s,
                alternative_s=alternative_s,
                measured_s=record.measured_s,
            )
            self._done.append(measurement)


class _Line:
    """Least squares of seconds over numbers of decodes, recent steps first in weight."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def known(self) -> bool:
        return self._weight >= 4.0

    def add(self, x: float, y: float) -> None:
        self.add_all(x, (y,))

    def add_all(self, x: float, ys: Sequence[float]) -> None:
        weight, sum_x, sum_y, sum_xx, sum_xy = self._weight, self._x, self._y, self._xx, self._xy
        for y in ys:
            weight = DECAY * weight + 1.0
            sum_x = DECAY * sum_x + x
            sum_y = DECAY * sum_y + y
            sum_xx = DECAY * sum_xx + x * x
            sum_xy = DECAY * sum_xy + x * y
        self._weight, self._x, self._y, self._xx, self._xy = weight, sum_x, sum_y, sum_xx, sum_xy

    def at(self, x: float) -> float:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance < 0.25:  # about one number of decodes only: no slope can be told
            return mean_y
        return mean_y + (self._xy / self._weight - mean_x * mean_y) / variance * (x - mean_x)
