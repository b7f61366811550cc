"""Who may be admitted ahead of a request that does not fit, so that free memory is used and nobody starves.

Rules:
- Requests are admitted in the fair order as long as they fit memory and batch. The first that does not fit is *blocked*; who
  comes behind it and does fit may go ahead of it.
- Whoever goes ahead uses up the allowance of everybody that it passes: at most `limit_tokens` prompt tokens are admitted
  ahead of a blocked request in all its time, over all steps. Then nobody passes it until it is admitted: running requests
  end, and since no request needs more than the pool, it fits at last.
- Nobody passes whose tenant is ahead of the blocked one's by more than `limit_service` / weight, as of the step's beginning:
  prompts do not limit what is generated, and a tenant with short prompts would pass every next head of one with long ones
  anew and leave it behind without end. So the stated bound grows by `limit_service` once (its B).
- A preempted request is not passed by others of its tenant while no blocks are kept free for growth
  (`replicas/headroom.py`): they would fill the room that it has just made for those who run, and be preempted in turn.
- A plan changes nothing; what came of it is told (`admitted`), so that only those count who really went ahead.
- Work conservation: in every step, the next in the fair order is not admitted only if it does not fit; and who fits behind a
  blocked one is not admitted only if an allowance is used up or it is held back. `left_idle` finds an offence.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a waiting request takes when it is admitted."""

    request_id: str
    num_blocks: int
    """KV blocks of its first chunk, headroom included."""

    num_tokens: int
    """Prompt tokens to compute."""

    min_batch_tokens: int = 1
    """Least that the step's batch must have left: 1 with chunked prefill, else all to compute."""

    key: float = 0.0
    """Normalised service of its tenant."""

    weight: float = 1.0
    """Of its tenant."""

    tenant: str = ""
    holds_back: bool = False
    """Whether others of its tenant may not pass it; see the rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a step can still take."""

    num_free_blocks: int
    num_batch_tokens: int
    num_seqs: int

    def fits(self, need: Need) -> bool:
        """Whether a request could be admitted."""
        return need.num_blocks <= self.num_free_blocks and self.has_batch(need)

    def has_batch(self, need: Need) -> bool:
        """Whether the batch has room, if memory had: if not, nobody is blocked, and the step ends."""
        return need.min_batch_tokens <= self.num_batch_tokens and self.num_seqs > 0

    def after(self, need: Need) -> "Room":
        """What is left when it is admitted."""
        return replace(
            self,
            num_free_blocks=self.num_free_blocks - need.num_blocks,
            num_batch_tokens=max(0, self.num_batch_tokens - need.num_tokens),
            num_seqs=self.num_seqs - 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who is to be admitted in a step, and why not more."""

    admits: list[tuple[Need, list[str]]]
    """In this order, ahead of everybody else; each with the blocked requests that it passes."""

    reason: str

    @property
    def first(self) -> list[str]:
        """Ids of those who are to be admitted, in order."""
        return [need.request_id for need, _ in self.admits]


class Bypass:
    """Decides who goes ahead of blocked requests, and remembers what each of those has been passed by."""

    def __init__(self, limit_tokens: int, limit_service: float) -> None:
        """Start with nobody blocked.

        Args:
            limit_tokens: Prompt tokens that may be admitted ahead of one blocked request; 0 lets nobody pass.
            limit_service: Service at weight 1 by which a tenant may be ahead and still pass.

        Raises:
            ValueError: A limit is negative.
        """
        if limit_tokens < 0:
            raise ValueError("limit_tokens must not be negative; 0 lets nobody pass a blocked request.")
        if not 0.0 <= limit_service < math.inf:
            raise ValueError("limit_service must be a number from 0 on; 0 lets nobody pass who is ahead.")
        self.limit_tokens = limit_tokens
        self.limit_service = limit_service
        self._passed_tokens: dict[str, int] = {}

    def passed_tokens(self, request_id: str) -> int:
        """Tokens that were admitted ahead of a blocked request so far."""
        return self._passed_tokens.get(request_id, 0)

    def is_spent(self, request_id: str) -> bool:
        """Whether nobody may go ahead of a blocked request any more."""
        return self.passed_tokens(request_id) >= self.limit_tokens

    def plan(self, order: Sequence[Need], room: Room) -> Plan:
        """Decide a step.

        Args:
            order: The next requests in fair order; how many is how far the step may look.
        """
        admits: list[tuple[Need, list[str]]] = []
        blocked: list[Need] = []
        planned: Counter[str] = Counter()  # tokens that this plan puts ahead of the blocked
        reason = "all of these were considered"
        for need in order:
            if not room.has_batch(need):
                reason = "the batch is full"
                break
            if not room.fits(need) or self._is_held(blocked, need):
                blocked.append(need)
                continue
            if (why := self._why_not(blocked, need, planned)) is not None:
                reason = why
                break
            planned.update({each.request_id: need.num_tokens for each in blocked})
            room = room.after(need)
            admits.append((need, [each.request_id for each in blocked]))
        return Plan(admits=admits, reason=reason)

    def admitted(self, plan: Plan, request_ids: Collection[str]) -> None:
        """Count whom those have passed who were admitted; others of the plan have passed nobody."""
        for need, passed in plan.admits:
            if need.request_id in request_ids:
                for each in passed:
                    self._passed_tokens[each] = self.passed_tokens(each) + need.num_tokens
                self._passed_tokens.pop(need.request_id, None)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Let requests go that wait no more."""
        for request_id in request_ids:
            self._passed_tokens.pop(request_id, None)

    def left_idle(self, order: Sequence[Need], room: Room) -> str | None:
        """Return a request that should have been admitted and was not, or None.

        Args:
            order: Fair order of those who wait after the step.
            room: What the step left.
        """
        blocked: list[Need] = []
        for need in order:
            if not room.has_batch(need):
                return None
            if room.fits(need) and not self._is_held(blocked, need):
                return need.request_id if self._why_not(blocked, need, Counter()) is None else None
            blocked.append(need)
        return None

    def _is_held(self, blocked: Sequence[Need], need: Need) -> bool:
        """Whether one of the same tenant that lets none of it pass stands before it."""
        return any(each.holds_back and each.tenant == need.tenant for each in blocked)

    def _why_not(self, blocked: Sequence[Need], need: Need, planned: Counter[str]) -> str | None:
        """Why a request may not pass those who are blocked, or None if it may."""
        for each in blocked:
            num_tokens = self.passed_tokens(each.request_id) + planned[each.request_id]
            if num_tokens + need.num_tokens > self.limit_tokens:
                return f"{each.request_id} does not fit and has been passed by {num_tokens} tokens"
            if (need.key - each.key) * need.weight > self.limit_service:
                return f"{each.request_id} does not fit and the tenant of {need.request_id} is too far ahead of its own"
        return None
