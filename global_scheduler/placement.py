"""Which replica a request goes to: its tenant's backlog spread, room for KV, cached beginnings; ties by id.

Rules:
1. A tenant's backlog is even: a replica where more of its tokens wait than at the best one, by over `exchange_tokens`, is
   out. So no tenant's backlogs differ by more than that and one request because of where it was sent.
2. Of the others, the one with most room is taken: free KV blocks, less the tokens of those who wait there.
3. A prompt's cached beginning counts as room, `CACHED_WORTH` times its tokens, up to `exchange_tokens`: so much more may be
   in work at a replica for what it need not compute. This one constant limits all that affinity may cost in balance.
4. Ties go to the lower id: the same history gives the same placement.
- What replicas say is old. What was sent since counts until a report of a later time, or until its end: routers do not herd
  to the replica that looked empty. Each router knows its own requests alone; others' come with the next report.
- A replica that has not said anything, or is at work and says nothing for `max_age_s`, is taken for an average one, plus
  what was sent there and is not over. If all are silent, requests go where fewest tokens of this router's are in work.
- Placement only: nothing waits here.

O(replicas) for each request, in arrays. No clock: whoever drives it says the time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cost_service.service_messages import ReplicaLoad
from global_scheduler.prefix_homes import Mark, PrefixHomes

CACHED_WORTH = 4
"""Tokens of room that one cached token is worth, for it saves computing too. Simulations gave less throughput at 1 and 2."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """How far the aims of placement give way to each other."""

    exchange_tokens: int = 8192
    """Imbalance that is borne, of a tenant's backlog and for cached beginnings: what a GPU's engine computes in a step."""

    max_age_s: float = 5.0
    """A replica at work that has said nothing for so long is taken for an average one."""

    def __post_init__(self) -> None:
        for name in ("exchange_tokens", "max_age_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative: it is {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a request goes, and why."""

    request_id: str
    replica: str
    backlog_tokens: float
    """Of its tenant, waiting there or sent since."""

    least_backlog_tokens: float
    """The same where it is least."""

    free_tokens: float
    """Room there; negative where more wait than there is."""

    cached_tokens: int
    """Of the prompt, as far as is believed."""

    num_candidates: int
    """Replicas where the tenant's backlog let it go."""

    num_silent: int
    """Replicas that were taken for average ones."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that no report tells of yet."""

    replica: str
    tenant: str
    num_tokens: int
    """Those that are not cached there."""

    sent_s: float


class Placement:
    """The replicas as one router knows them."""

    def __init__(self, settings: PlacementSettings | None = None, homes: PrefixHomes | None = None) -> None:
        self.settings = settings or PlacementSettings()
        self.homes = homes or PrefixHomes()
        self._names: list[str] = []
        self._places: dict[str, int] = {}
        self._free = self._heard_s = self._sent = np.zeros(0)
        self._works = np.zeros(0, dtype=bool)
        self._backlogs: dict[str, Floats] = {}
        """By tenant, as reported."""

        self._own_backlogs: dict[str, Floats] = {}
        """By tenant, sent since."""

        self._num_own: dict[str, int] = {}
        """Requests in each of those."""

        self._told: dict[str, dict[str, int]] = {}
        """Backlogs by tenant, by replica."""

        self._requests: dict[str, _Sent] = {}
        self._requests_at: dict[str, dict[str, None]] = {}
        """By replica, in the order in which they were sent."""

    def __len__(self) -> int:
        """Replicas that are up."""
        return len(self._names)

    def __contains__(self, replica: object) -> bool:
        return replica in self._places

    def up(self, replica: str) -> None:
        """A replica has come up, and has not said anything."""
        assert replica not in self._places, f"{replica} is up already"
        self._arrange(sorted([*self._names, replica]))
        self._requests_at[replica] = {}
        self.homes.up(replica)

    def down(self, replica: str) -> None:
        """A replica is gone, with all that it had."""
        for request_id in list(self._requests_at[replica]):
            self._take_back(request_id)
        self._note(replica, {})
        del self._requests_at[replica], self._told[replica]
        self._arrange([name for name in self._names if name != replica])
        self.homes.down(replica)

    def report(self, replica: str, load: ReplicaLoad, *, as_of_s: float, now_s: float) -> None:
        """Take what a replica says.

        Args:
            as_of_s: When it was like that, rather too early than too late: what was sent before is in it.
            now_s: When it was heard.
        """
        self._note(replica, {tenant: num for tenant, num in load.backlog.items() if num > 0})
        place = self._places[replica]
        self._free[place] = load.num_free_blocks * load.block_size - load.num_waiting_tokens
        self._heard_s[place] = now_s
        self._works[place] = load.num_running + load.num_waiting > 0
        self.homes.set_pool(replica, load.num_blocks * load.block_size)
        for request_id in list(self._requests_at[replica]):
            if self._requests[request_id].sent_s >= as_of_s:
                break
            self._take_back(request_id)

    def place(
        self, request_id: str, *, tenant: str, num_tokens: int, marks: Sequence[Mark] = (), now_s: float
    ) -> Decision:
        """Choose a replica, and count the request as sent there.

        Args:
            num_tokens: Of the prompt, about; at least 1.
            marks: Of its beginning (`global_scheduler.prefix_homes`).
        """
        assert self._names, "no replica is up"
        assert num_tokens >= 1, f"a prompt of {num_tokens} tokens"
        assert request_id not in self._requests, f"{request_id} was sent already"
        silent = self._silent(now_s)
        backlog = self._backlog_of(tenant, silent)
        free = _average_for(silent, self._free) - self._sent
        cached = {name: min(num, num_tokens) for name, num in self.homes.cached(marks).items()} if marks else {}
        exchange = self.settings.exchange_tokens
        room = free.copy()
        for name, num in cached.items():
            room[self._places[name]] += min(CACHED_WORTH * num, exchange)
        least = float(backlog.min())
        candidates = backlog <= least + exchange
        room[~candidates] = -math.inf
        place = int(np.argmax(room))
        replica = self._names[place]
        num_cached = cached.get(replica, 0)
        self._count(request_id, _Sent(replica, tenant, max(1, num_tokens - num_cached), now_s))
        self.homes.serve(marks, replica, num_tokens - num_cached)
        return Decision(
            request_id=request_id, replica=replica, backlog_tokens=float(backlog[place]), least_backlog_tokens=least,
            free_tokens=float(free[place]), cached_tokens=num_cached, num_candidates=int(candidates.sum()),
            num_silent=int(silent.sum()),
        )  # fmt: skip

    def ended(self, request_id: str) -> None:
        """A request is over, or was never sent; those that are in a report already are left out."""
        if request_id in self._requests:
            self._take_back(request_id)

    def moved(self, request_id: str, replica: str) -> None:
        """A request went to another replica than was chosen."""
        sent = self._requests.get(request_id)
        if sent is not None and sent.replica != replica and replica in self._places:
            self._take_back(request_id)
            self._count(request_id, replace(sent, replica=replica))

    def check(self) -> None:
        """Assert what always holds; O(replicas * tenants + requests)."""
        assert self._names == sorted(self._places), "replicas are out of order"
        assert sum(len(each) for each in self._requests_at.values()) == len(self._requests), "a request astray"
        sent, own = np.zeros(len(self)), {tenant: np.zeros(len(self)) for tenant in self._own_backlogs}
        for request_id, one in self._requests.items():
            assert request_id in self._requests_at[one.replica], f"{request_id} is not at {one.replica}"
            sent[self._places[one.replica]] += one.num_tokens
            own[one.tenant][self._places[one.replica]] += one.num_tokens
        assert np.array_equal(sent, self._sent), "tokens that were sent are counted wrongly"
        for tenant, tokens in own.items():
            assert np.array_equal(tokens, self._own_backlogs[tenant]), f"backlog of {tenant!r}"
            assert tokens.any(), f"{tenant!r} is kept for nothing"
        reported: dict[str, Floats] = {tenant: np.zeros(len(self)) for tenant in self._backlogs}
        for replica, backlog in self._told.items():
            for tenant, num in backlog.items():
                reported[tenant][self._places[replica]] += num
        for tenant, tokens in reported.items():
            assert np.array_equal(tokens, self._backlogs[tenant]), f"reported backlog of {tenant!r}"
            assert tokens.any(), f"{tenant!r} is kept for nothing"
        self.homes.check()

    def _silent(self, now_s: float) -> npt.NDArray[np.bool_]:
        """Replicas that have never said anything, or should have by now."""
        late = now_s - self._heard_s > self.settings.max_age_s
        return np.isnan(self._free) | (late & (self._works | (self._sent > 0)))

    def _backlog_of(self, tenant: str, silent: npt.NDArray[np.bool_]) -> Floats:
        reported, own = self._backlogs.get(tenant), self._own_backlogs.get(tenant)
        backlog = np.zeros(len(self)) if reported is None else _average_for(silent, reported)
        return backlog if own is None else backlog + own

    def _take_back(self, request_id: str) -> _Sent:
        """Let a request count no more as sent."""
        sent = self._requests.pop(request_id)
        del self._requests_at[sent.replica][request_id]
        self._add(sent, -1)
        return sent

    def _count(self, request_id: str, sent: _Sent) -> None:
        self._requests[request_id] = sent
        self._requests_at[sent.replica][request_id] = None
        self._add(sent, 1)

    def _add(self, sent: _Sent, sign: int) -> None:
        place, tenant = self._places[sent.replica], sent.tenant
        self._sent[place] += sign * sent.num_tokens
        if tenant not in self._own_backlogs:
            self._own_backlogs[tenant] = np.zeros(len(self))
        self._own_backlogs[tenant][place] += sign * sent.num_tokens
        num = self._num_own[tenant] = self._num_own.get(tenant, 0) + sign
        if not num:
            del self._own_backlogs[tenant], self._num_own[tenant]

    def _note(self, replica: str, backlog: dict[str, int]) -> None:
        """Put what a replica says of tenants in the place of what it said before."""
        place = self._places[replica]
        for tenant in self._told.get(replica, {}):
            self._backlogs[tenant][place] = 0.0
            if tenant not in backlog and not self._backlogs[tenant].any():
                del self._backlogs[tenant]
        for tenant, num_tokens in backlog.items():
            if tenant not in self._backlogs:
                self._backlogs[tenant] = np.zeros(len(self))
            self._backlogs[tenant][place] = num_tokens
        self._told[replica] = backlog

    def _arrange(self, names: list[str]) -> None:
        """Let the arrays stand for other replicas."""
        before = [self._places.get(name, len(self._names)) for name in names]
        self._names, self._places = names, {name: place for place, name in enumerate(names)}

        def arrange(values: Floats, fill: float) -> Floats:
            return np.append(values, fill)[before]

        self._free = arrange(self._free, math.nan)
        self._heard_s = arrange(self._heard_s, -math.inf)
        self._sent = arrange(self._sent, 0.0)
        self._works = np.append(self._works, False)[before]
        for backlogs in (self._backlogs, self._own_backlogs):
            for tenant, tokens in backlogs.items():
                backlogs[tenant] = arrange(tokens, 0.0)


def _average_for(silent: npt.NDArray[np.bool_], values: Floats) -> Floats:
    """The values, with the mean of the others for those that are silent; zeros where all are."""
    if not silent.any():
        return values
    heard = values[~silent]
    return np.where(silent, heard.mean() if heard.size else 0.0, values)
