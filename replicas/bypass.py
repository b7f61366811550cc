"""Who may be admitted ahead of a request that does not fit, so that free memory is used and nobody starves.

Rules:
- Requests are admitted in the fair order as long as they fit memory and batch. The first that does not fit is *blocked*; who
  comes behind it and does fit may go ahead of it.
- Whoever goes ahead uses up the allowance of everybody that it passes: at most `limit_tokens` prompt tokens are admitted
  ahead of a blocked request in all its time, over all steps. Then nobody passes it until it is admitted: running requests
  end, and since no request needs more than the pool, it fits at last.
- Work conservation: in every step, the next in the fair order is not admitted only if it does not fit; and who fits behind a
  blocked one is not admitted only if an allowance is used up. `left_idle` finds an offence.

Who is over the allowance counts against the order, not against fairness: its tenant is charged as always.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a waiting request takes when it is admitted."""

    request_id: str
    num_blocks: int
    """KV blocks of its first chunk, headroom included."""

    num_tokens: int
    """Tokens of the step's batch that its first chunk takes."""


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
        return need.num_tokens <= self.num_batch_tokens and self.num_seqs > 0

    def after(self, need: Need) -> "Room":
        """What is left when it is admitted."""
        return replace(
            self,
            num_free_blocks=self.num_free_blocks - need.num_blocks,
            num_batch_tokens=self.num_batch_tokens - need.num_tokens,
            num_seqs=self.num_seqs - 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Who is admitted in a step, and why not more."""

    first: list[str]
    """To be admitted in this order, ahead of everybody else."""

    blocked: list[str]
    """Those whom somebody in `first` passes."""

    reason: str


class Bypass:
    """Decides who goes ahead of blocked requests, and remembers what each of those has been passed by."""

    def __init__(self, limit_tokens: int) -> None:
        """Start with nobody blocked.

        Args:
            limit_tokens: Prompt tokens that may be admitted ahead of one blocked request; 0 lets nobody pass.

        Raises:
            ValueError: The limit is negative.
        """
        if limit_tokens < 0:
            raise ValueError("limit_tokens must not be negative; 0 lets nobody pass a blocked request.")
        self.limit_tokens = limit_tokens
        self._passed_tokens: dict[str, int] = {}

    def passed_tokens(self, request_id: str) -> int:
        """Tokens that were admitted ahead of a blocked request so far."""
        return self._passed_tokens.get(request_id, 0)

    def plan(self, order: Sequence[Need], room: Room) -> Plan:
        """Decide a step, and count who is passed by whom.

        Args:
            order: The next requests in fair order; how many is how far the step may look.
        """
        first: list[str] = []
        blocked: list[Need] = []
        passed: list[Need] = []  # those of the blocked who somebody has gone ahead of
        reason = "all of these were considered"
        for need in order:
            if not room.has_batch(need):
                reason = "the batch is full"
                break
            if not room.fits(need):
                blocked.append(need)
                continue
            if (full := next((each for each in blocked if not self._allows(each, need)), None)) is not None:
                num_tokens = self.passed_tokens(full.request_id)
                reason = f"{full.request_id} does not fit and has been passed by {num_tokens} tokens"
                break
            for each in blocked:
                self._passed_tokens[each.request_id] = self.passed_tokens(each.request_id) + need.num_tokens
            passed = list(blocked)
            room = room.after(need)
            first.append(need.request_id)
            self._passed_tokens.pop(need.request_id, None)
        return Plan(first=first, blocked=[each.request_id for each in passed], reason=reason)

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
            if room.fits(need):
                return need.request_id if all(self._allows(each, need) for each in blocked) else None
            blocked.append(need)
        return None

    def _allows(self, blocked: Need, need: Need) -> bool:
        return self.passed_tokens(blocked.request_id) + need.num_tokens <= self.limit_tokens
