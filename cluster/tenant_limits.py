"""What of each tenant one ingress has in work, the caps on that, and when somebody who was over one should come again.

Rules:
- A request counts from its admission to the end of its answer, whoever ends it. It is queued until its first output is seen:
  the first event of a stream; of an answer that comes at once, its end. One body counts once for every prompt and choice
  that it asks for, as engines count.
- Nobody is asked: each ingress enforces its share of a cap, cap / ingresses rounded up; a tenant whose connections all lead
  to one ingress has that one's share alone. A request that is larger than the share, but not than the cap, is admitted
  where nothing of its tenant counts under that cap.
- So an ingress has at most its share of a cap, or one request within the whole cap. All together stay within
  cap + ingresses - 1 while no request is larger than a share, and within cap * ingresses whatever comes. While ingresses are
  replaced, both generations count for themselves: twice that.
- Only a request that is larger than a cap by itself is never told to come again.
- No clock, no randomness: times are handed in, in seconds, of a clock that should not go back and does no harm if it does.

Who is refused takes the next turn in the tenant's own drain: turns are 1 / rate apart, so that those who were refused
together do not come back together. The rate is of requests that ended per second in which the tenant had any in work,
exponentially weighted, and begins as one in a second.
"""

import math
from dataclasses import dataclass, fields
from enum import Enum, auto

MAX_LIMIT = 2**53
"""Whole numbers up to here are exact wherever JSON is read."""

RATE_TIME_S = 30.0
"""Seconds with work after which an ending counts 1/e in the rate."""

PRIOR_ENDED, PRIOR_S = 1.0, 1.0

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0
"""Clients of OpenAI's obey a `Retry-After` of up to a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """Caps of one tenant over all ingresses; None is no cap.

    Raises:
        ValueError: A cap is no whole number from 1 to 2^53.
    """

    max_concurrent_requests: int | None = None
    """Requests whose answers have not ended."""

    max_queued_requests: int | None = None
    """Those of them without any output yet."""

    max_queued_tokens: int | None = None
    """Prompt tokens of these, as the ingress takes them from a text's length."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_LIMIT):
                raise ValueError(f"{field.name} must be a whole number from 1 to 2^53, or none for no cap.")

    def share(self, num_ingresses: int) -> "TenantLimits":
        """What one of several ingresses enforces."""
        assert num_ingresses >= 1, f"{num_ingresses} ingresses"
        caps = {field.name: getattr(self, field.name) for field in fields(self)}
        return TenantLimits(**{name: None if cap is None else -(-cap // num_ingresses) for name, cap in caps.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is not admitted."""

    cap: str
    """The field of `TenantLimits` that it is over."""

    limit: int
    """This ingress's share of it; the whole cap for a request that is larger than that."""

    retry_after_s: float | None
    """When it has a chance; None: never, for it is larger than the cap by itself."""


class Phase(Enum):
    """Where an admitted request is."""

    QUEUED = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One admitted request."""

    tenant: str
    num_requests: int
    prompt_tokens: int
    phase: Phase = Phase.QUEUED


@dataclass(slots=True)
class TenantLoad:
    """One tenant's work at one ingress."""

    concurrent_requests: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0

    ended: float = 0.0
    """Exponentially weighted, as are the seconds they took."""

    busy_s: float = 0.0
    seen_s: float = 0.0
    last_turn_s: float = -math.inf

    @property
    def drain_rate(self) -> float:
        """Requests that end per second with work; above 0."""
        return (self.ended + PRIOR_ENDED) / (self.busy_s + PRIOR_S)

    def advance(self, now_s: float) -> None:
        """Let time pass."""
        elapsed_s = max(0.0, now_s - self.seen_s)
        self.seen_s = now_s
        if self.concurrent_requests:
            kept = math.exp(-elapsed_s / RATE_TIME_S)
            self.ended *= kept
            self.busy_s = self.busy_s * kept + RATE_TIME_S * (1.0 - kept)

    def take_turn(self, num_ahead: float, now_s: float) -> float:
        """Return the seconds until so many requests should have ended, and all have who were refused before."""
        turn_s = max(now_s + num_ahead / self.drain_rate, self.last_turn_s + 1.0 / self.drain_rate)
        self.last_turn_s = min(turn_s, now_s + MAX_RETRY_AFTER_S)
        return max(MIN_RETRY_AFTER_S, self.last_turn_s - now_s)


class Admissions:
    """Admits requests of tenants, and knows all that have not ended; lives on one thread."""

    def __init__(self, *, num_ingresses: int) -> None:
        """Begin with nothing in work, as one of so many ingresses."""
        assert num_ingresses >= 1, f"{num_ingresses} ingresses"
        self._num_ingresses = num_ingresses
        self._loads: dict[str, TenantLoad] = {}

    def load(self, tenant: str) -> TenantLoad:
        """What a tenant has in work here."""
        return self._loads.get(tenant, TenantLoad())

    def admit(
        self, tenant: str, limits: TenantLimits, *, num_requests: int, prompt_tokens: int, now_s: float
    ) -> Ticket | Refusal:
        """Admit a request within its tenant's caps.

        Args:
            limits: Over all ingresses, as they are now.
            num_requests: Prompts times choices.
            prompt_tokens: Of all prompts together.
        """
        assert num_requests >= 1, f"{num_requests} requests"
        assert prompt_tokens >= 0, f"{prompt_tokens} tokens"
        load = self._loads.setdefault(tenant, TenantLoad(seen_s=now_s))
        load.advance(now_s)
        share = limits.share(self._num_ingresses)
        if refusal := _refusal(load, limits, share, num_requests, prompt_tokens, now_s):
            return refusal
        load.concurrent_requests += num_requests
        load.queued_requests += num_requests
        load.queued_tokens += prompt_tokens
        return Ticket(tenant=tenant, num_requests=num_requests, prompt_tokens=prompt_tokens)

    def start(self, ticket: Ticket, now_s: float) -> None:
        """Take note of a request's first output; nothing for later ones, or after its end."""
        if ticket.phase is not Phase.QUEUED:
            return
        load = self._loads[ticket.tenant]
        load.advance(now_s)
        ticket.phase = Phase.RUNNING
        load.queued_requests -= ticket.num_requests
        load.queued_tokens -= ticket.prompt_tokens
        assert load.queued_requests >= 0 <= load.queued_tokens, f"{ticket.tenant} has less than nothing queued"

    def end(self, ticket: Ticket, now_s: float) -> None:
        """Take note that a request is over, by whatever cause; a second time is nothing."""
        if ticket.phase is Phase.ENDED:
            return
        self.start(ticket, now_s)
        load = self._loads[ticket.tenant]
        load.advance(now_s)
        ticket.phase = Phase.ENDED
        load.concurrent_requests -= ticket.num_requests
        load.ended += ticket.num_requests
        assert load.concurrent_requests >= load.queued_requests, f"{ticket.tenant} has more queued than in work"

    def check(self) -> None:
        """Assert that counts agree with each other."""
        for tenant, load in self._loads.items():
            assert 0 <= load.queued_requests <= load.concurrent_requests, f"{tenant}: {load}"
            assert load.queued_tokens >= 0, f"{tenant}: {load}"
            assert load.queued_requests or not load.queued_tokens, f"{tenant}: tokens are queued without requests"
            assert math.isfinite(load.drain_rate), f"{tenant}: {load}"
            assert load.drain_rate > 0, f"{tenant}: {load}"


def _refusal(
    load: TenantLoad, limits: TenantLimits, share: TenantLimits, num_requests: int, prompt_tokens: int, now_s: float
) -> Refusal | None:
    """The cap that a request is over by most requests of its tenant's, or None."""
    tokens_per_request = load.queued_tokens / load.queued_requests if load.queued_tokens else 1.0
    worst: tuple[float, str, int] | None = None
    for cap, used, asked, per_request in (
        ("max_concurrent_requests", load.concurrent_requests, num_requests, 1.0),
        ("max_queued_requests", load.queued_requests, num_requests, 1.0),
        ("max_queued_tokens", load.queued_tokens, prompt_tokens, tokens_per_request),
    ):
        most, limit = getattr(limits, cap), getattr(share, cap)
        if most is None or used + asked <= limit:
            continue
        if asked > most:
            return Refusal(cap=cap, limit=most, retry_after_s=None)
        if not used:
            continue  # larger than the share: it would never be admitted beside others
        num_ahead = min(used, used + asked - limit) / per_request
        if worst is None or num_ahead > worst[0]:
            worst = (num_ahead, cap, limit)
    if worst is None:
        return None
    num_ahead, cap, limit = worst
    return Refusal(cap=cap, limit=limit, retry_after_s=load.take_turn(num_ahead, now_s))
