"""One level of virtual token counters: how much normalised service each of its names has had, and who waits where.

Rules:
- A counter rises by service / weight as service is given; it falls by refunds alone, and never below its last lift.
- *Waiting* is what VTC calls backlogged: a request that is not admitted, at any replica. Who begins to wait anywhere is
  lifted: to the least counter among those who wait at the replicas it waits at, whichever replica's is most; with nobody
  there, to the least who waits anywhere; with nobody waiting at all, to the last who ceased to. Otherwise unused time could
  be saved up.
- Who waits already and begins to wait at another replica keeps its counter, but not more than `credit` / weight below the
  least there: being held up at one busy replica is no claim to the others.
- Who was admitted without being seen waiting came and went between two reports: lifted, then charged, and where nobody waits
  it is the last who ceased to. Else counters would drift apart while nobody waits, and whoever had used little would take
  all when both begin to.
- Who is neither waiting nor running is forgotten once its counter is at most what a lift would give it: nothing is lost.
  A higher one is debt and is kept until the others have caught up, up to `MAX_DEBTORS` of them, the largest.

With one replica this is VTC (arXiv:2401.00588, algorithm 2), the branch for the last tenant that left included. Lifting by
replica differs from it only where tenants wait at different replicas: a newcomer that is lifted to a tenant which one busy
replica holds back would have all others to itself until it is as far behind.
"""

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import Any

from cost_service.charges import checked_weight
from cost_service.lowest import SPARE_ENTRIES, Lowest

MAX_DEBTORS = 20_000

NOWHERE: Mapping[str, bool] = {}


class Level:
    """Counters of all tenants of a pool, or of all users of a tenant."""

    def __init__(self, *, credit: float = math.inf) -> None:
        self.credit = credit
        """Normalised service at weight 1 that waiting elsewhere may be ahead by; see the rules."""
        self._weights: dict[str, float] = {}
        self._counters: dict[str, float] = {}
        self._lifts: dict[str, float] = {}
        self._present: dict[str, dict[str, bool]] = {}  # replicas with requests of a name, and whether any waits there
        self._num_present_at: dict[str, int] = {}
        self._num_waits: dict[str, int] = {}  # replicas at which a name waits
        self._waiting = Lowest(self._counters.__getitem__)
        self._waits = self._waiting.members
        self._waiting_at: dict[str, Lowest] = {}
        self._last: str | None = None  # who ceased to wait last when nobody was left
        self._floor = 0.0  # its counter, should it be forgotten
        self._debtors: list[tuple[float, str]] = []

    @classmethod
    def of_one(cls, name: str, counter: float, places: Mapping[str, bool]) -> "Level":
        """One name that was alone until now: it has had so much service, and it is at these places."""
        level = cls()
        level._counters[name] = counter
        level._last, level._floor = name, counter
        for replica, waiting in places.items():
            level.set_present(name, replica, waiting=waiting, running=True, lifts=False)
        if not places:
            level._left(name)
        return level

    def __contains__(self, name: object) -> bool:
        return name in self._counters

    def __len__(self) -> int:
        return len(self._counters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counters)

    def counter(self, name: str) -> float:
        """Normalised service, lifts included; 0 for strangers."""
        return self._counters.get(name, 0.0)

    def weight(self, name: str) -> float:
        return self._weights.get(name, 1.0)

    def is_waiting(self, name: str) -> bool:
        """Whether it has a waiting request at any replica."""
        return name in self._waiting

    @property
    def virtual_time(self) -> float:
        """The least counter among those who wait, or the last who did."""
        lowest = self._waiting.lowest()
        if lowest is not None:
            return lowest[0]
        return self._floor if self._last is None else max(self._floor, self.counter(self._last))

    def virtual_time_at(self, replica: str) -> float | None:
        """The least counter among those who wait at that replica, or None."""
        here = self._waiting_at.get(replica)
        lowest = here.lowest() if here is not None else None
        return None if lowest is None else lowest[0]

    def set_weight(self, name: str, weight: float) -> None:
        """Charge by another weight from now on; what was charged stays.

        Raises:
            ValueError: The weight is out of range.
        """
        self._weights[name] = checked_weight(weight)

    def charge(self, name: str, service: float, *, admitted: bool = False) -> None:
        """Add service; a negative one is a refund. With `admitted` it holds prompts of requests that began."""
        assert math.isfinite(service), f"{name!r} is charged {service}"
        present, passed = name in self._present, admitted and name not in self._waits
        if passed or not present:
            self._lift(name, self.virtual_time)
            if passed and not self._waits:
                self._last, self._floor = name, self.virtual_time
        before = self._counters[name]
        self._counters[name] = after = before + service / self._weights.get(name, 1.0)
        if after < before:
            self._counters[name] = max(after, self._lifts.get(name, 0.0))
            self._fell(name)
        if not present:
            self._left(name)

    def set_present(self, name: str, replica: str, *, waiting: bool, running: bool, lifts: bool = True) -> None:
        """Say whether requests of a name wait and run at a replica; charges of the same report come first.

        Without `lifts` it was there before, and is only learned now: a scheduler that was away is told what was.
        """
        places = self._present.get(name)
        if places is None:
            if not waiting and not running:
                self._left(name)
                return
            if name not in self._counters:
                self._lift(name, self.virtual_time if lifts and not waiting else 0.0)
            places = self._present[name] = {}
        was_waiting = places.get(replica)
        if waiting and not was_waiting:
            self._begins_to_wait(name, replica, lifts=lifts)
        elif was_waiting and not waiting:
            self._ceases_to_wait(name, replica)
        if waiting or running:
            places[replica] = waiting
            if was_waiting is None:
                self._num_present_at[replica] = self._num_present_at.get(replica, 0) + 1
        elif was_waiting is not None:
            del places[replica]
            self._num_present_at[replica] -= 1
            if not places:
                del self._present[name]
                self._left(name)

    def is_at(self, name: str, replica: str, *, waiting: bool, running: bool) -> bool:
        """Whether `set_present` would say nothing new."""
        places = self._present.get(name)
        return places is not None and places.get(replica) is waiting and (waiting or running)

    def presence_at(self, replica: str) -> tuple[bool, bool]:
        """Whether anybody waits at a replica, and whether anybody waits or runs there."""
        return replica in self._waiting_at, self._num_present_at.get(replica, 0) > 0

    def places_of(self, name: str) -> Mapping[str, bool]:
        """Where it waits or runs: replicas, and whether it waits there."""
        return self._present.get(name, NOWHERE)

    def remove_replica(self, replica: str) -> None:
        """Nobody waits or runs there any more."""
        for name in [name for name, places in self._present.items() if replica in places]:
            self.set_present(name, replica, waiting=False, running=False)
        assert replica not in self._waiting_at, f"somebody waits at {replica}, which is gone"
        self._num_present_at.pop(replica, None)

    def raise_to(self, name: str, counter: float) -> None:
        """Take over a counter that an earlier life of the scheduler had told, if it is higher."""
        assert math.isfinite(counter), f"{name!r} is to have {counter}"
        self._lift(name, counter)
        if name not in self._present:
            self._left(name)

    def fold(self) -> list[str]:
        """Forget idle debtors whom the others have caught up with; return whom."""
        folded: list[str] = []
        floor = self.virtual_time
        num_beyond = len(self._counters) - len(self._present) - MAX_DEBTORS
        while self._debtors and (self._debtors[0][0] <= floor or len(folded) < num_beyond):
            known, name = heapq.heappop(self._debtors)
            if name in self._counters and name not in self._present:
                if (counter := self._counters[name]) <= max(floor, known):
                    self._forget(name)
                    folded.append(name)
                else:
                    heapq.heappush(self._debtors, (counter, name))
        return folded

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values; who is present is told again, without lifts."""
        return {
            "counters": dict(self._counters),
            "lifts": {name: self._lifts[name] for name in self._counters if name in self._lifts},
            "floor": self.virtual_time,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; only where nothing has happened yet."""
        assert not self._counters, "a state is restored over counters"
        for name, counter in state["counters"].items():
            if not math.isfinite(counter) or counter < 0.0:
                raise ValueError(f"The stored counter of {name!r} is {counter!r}; it must be a number from 0 on.")
        self._counters.update(state["counters"])
        self._lifts = dict(state["lifts"])
        self._floor = float(state["floor"])
        self._debtors = [(counter, name) for name, counter in self._counters.items()]
        heapq.heapify(self._debtors)

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        num_waits = {name: sum(places.values()) for name, places in self._present.items() if any(places.values())}
        assert num_waits == self._num_waits, "places at which names wait are miscounted"
        waiting = set(num_waits)
        assert waiting == set(self._waiting), "who waits anywhere is not who is said to"
        for replica, here in self._waiting_at.items():
            assert set(here) == {name for name, places in self._present.items() if places.get(replica)}, replica
        for name in waiting:
            assert name in self._counters, f"{name!r} waits without a counter"
        indexed = {name for _, name in self._debtors}
        assert all(name in indexed for name in self._counters if name not in self._present), (
            "a debtor would stay for ever"
        )
        assert all(self._counters[name] >= lift for name, lift in self._lifts.items()), (
            "a refund fell below the last lift"
        )

    def _begins_to_wait(self, name: str, replica: str, *, lifts: bool) -> None:
        here = self.virtual_time_at(replica)
        if name not in self._waits:
            if lifts:
                self._lift(name, self.virtual_time if here is None else here)
            self._num_waits[name] = 0
            self._waiting.add(name)
        elif lifts and here is not None:
            self._lift(name, here - self.credit / self.weight(name))
        self._num_waits[name] += 1
        if replica not in self._waiting_at:
            self._waiting_at[replica] = Lowest(self._counters.__getitem__)
        self._waiting_at[replica].add(name)

    def _ceases_to_wait(self, name: str, replica: str) -> None:
        here = self._waiting_at[replica]
        here.discard(name)
        if not here.members:
            del self._waiting_at[replica]
        self._num_waits[name] -= 1
        if not self._num_waits[name]:
            del self._num_waits[name]
            if len(self._waits) == 1:  # nobody is left
                self._last, self._floor = name, self.virtual_time
            self._waiting.discard(name)

    def _lift(self, name: str, floor: float) -> None:
        counter = self._counters.get(name)
        if counter is None:
            self._counters[name] = self._lifts[name] = max(0.0, floor)
        elif floor > counter:
            self._counters[name] = self._lifts[name] = floor

    def _fell(self, name: str) -> None:
        self._waiting.fell(name)
        for replica in self._present.get(name, ()):
            if replica in self._waiting_at:
                self._waiting_at[replica].fell(name)

    def _left(self, name: str) -> None:
        """Forget who has nothing left here, or note the debt."""
        if name not in self._counters:
            return
        if name != self._last and self._counters[name] <= self.virtual_time:
            self._forget(name)
        else:
            heapq.heappush(self._debtors, (self._counters[name], name))
            if len(self._debtors) > 2 * len(self._counters) + SPARE_ENTRIES:
                self._debtors = [(counter, n) for n, counter in self._counters.items() if n not in self._present]
                heapq.heapify(self._debtors)

    def _forget(self, name: str) -> None:
        if name == self._last:
            self._floor = max(self._floor, self._counters[name])
        del self._counters[name]
        self._lifts.pop(name, None)
