"""The fairness scheduler of a simulated cluster: the product's `FairShare`, and what travels to it and back.

Rules:
- Reports and answers are the product's own messages. They may be late, lost, or overtake one another.
- Who restarts the scheduler restores what it has stored last, if anything. A replica whose report it cannot take for that
  (it has answered the replica in another life) is asked for everything, and for the counters as it knows them.
- It hears of replicas that come and go as long as it is not away, and of all that are there when it is back.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.simulated_replica import Replica
from cost_service.service_messages import UNTOLD, Answer, Report, Version
from global_scheduler.counters import FairCounters
from global_scheduler.fair_share import FairShare


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSettings:
    """The scheduler and how it is reached."""

    interval_s: float | None = None
    """Between two reports of a replica; None: as the product asks of so many."""

    away: tuple[float, float] | None = None
    """From when to when it is away."""

    store_interval_s: float | None = 1.0
    """Between two stored states; None: nothing is stored."""

    def __post_init__(self) -> None:
        if self.interval_s is not None and not 0.0 < self.interval_s < math.inf:
            raise ValueError(f"--sync-interval-s must be above 0 and finite: it is {self.interval_s}.")
        if self.away is not None and not 0.0 <= self.away[0] < self.away[1]:
            raise ValueError("--fairness-away must be FROM:TO, seconds from 0 on, the second after the first.")

    @property
    def away_s(self) -> float:
        """For how long it is away."""
        return 0.0 if self.away is None else self.away[1] - self.away[0]


@dataclass(frozen=True, slots=True)
class _Message:
    """A report, and what its replica has heard so far."""

    report: Report
    known: Mapping[str, float] | None
    version: Version
    life: int


@dataclass(frozen=True, slots=True)
class _Reply:
    """An answer; None: the replica is to tell everything."""

    answered: int
    life: int
    answer: Answer | None


@dataclass(slots=True)
class _Heard:
    """What one life of a replica has heard."""

    version: Version = UNTOLD
    life: int = -1
    tells_everything: bool = True
    answered: int = field(default=0)


class SimulatedShare:
    """The scheduler, and every replica's end of the exchange; see `cluster.simulation.Exchange`."""

    def __init__(self, settings: ShareSettings, *, weights: Mapping[str, float], credit: float) -> None:
        """Begin without replicas.

        Args:
            weights: Of tenants; 1 for others.
            credit: See `FairCounters`.
        """
        self.settings, self._weights, self._credit = settings, weights, credit
        self.life = 0
        self.num_unknown = 0
        """Reports of replicas that were gone."""
        self._replicas: dict[str, None] = {}
        self._heard: dict[str, _Heard] = {}
        self._stored: str | None = None
        self._next_store_s = 0.0
        self.share = self._new_share()

    def up(self, replica: Replica) -> None:
        """See `Exchange`."""
        self._replicas[_name(replica)] = None
        self._heard[_name(replica)] = _Heard()
        self.share.add_replica(_name(replica))

    def down(self, replica: Replica) -> None:
        """See `Exchange`."""
        del self._replicas[_name(replica)]
        self.share.remove_replica(_name(replica))

    def report(self, replica: Replica, now_s: float) -> _Message:
        """See `Exchange`."""
        fair, heard = replica.engine.fair, self._heard[_name(replica)]
        assert fair is not None, "a replica whose order is first come has nothing to say"
        accounts = fair.report(everything=heard.tells_everything)
        report = Report(
            replica=_name(replica), epoch=str(replica.epoch), sequence=fair.core.sequence, accounts=accounts
        )  # fmt: skip
        known = dict(fair.core.service.known()) if heard.tells_everything else None
        return _Message(report, known, heard.version, heard.life)

    def read(self, message: _Message, now_s: float) -> _Reply | None:
        """See `Exchange`."""
        if self._is_away(now_s):
            return None
        self._store(now_s)
        report = message.report
        if report.replica not in self._replicas:
            self.num_unknown += 1
            return None
        if message.life != self.life and message.known is None:
            return _Reply(0, self.life, None)
        self.share.take(report, known=message.known)
        since = message.version if message.life == self.life else UNTOLD
        answer = self.share.answer(report.replica, report.epoch, since=since, named=report.accounts)
        return _Reply(report.sequence, self.life, answer)

    def learn(self, replica: Replica, answer: _Reply) -> None:
        """See `Exchange`."""
        heard, fair = self._heard[_name(replica)], replica.engine.fair
        assert fair is not None, "an answer to a replica whose order is first come"
        if answer.life < heard.life:
            return
        if answer.answer is None:
            heard.tells_everything = True
            return
        if answer.life == heard.life and answer.answered <= heard.answered:
            return  # a younger one was faster
        heard.life, heard.answered, heard.version = answer.life, answer.answered, answer.answer.version
        heard.tells_everything = False
        fair.core.learn(answer.answer.shares, answered=answer.answered)

    def check(self) -> None:
        """Assert what always holds."""
        self.share.check()

    def _is_away(self, now_s: float) -> bool:
        """Whether nobody is there; begins a new life when the time away is over."""
        away = self.settings.away
        if away is None or now_s < away[0]:
            return False
        if now_s < away[1]:
            return True
        if self.life == 0:
            self._revive()
        return False

    def _revive(self) -> None:
        self.life += 1
        self.share = self._new_share()
        if self._stored is not None:
            self.share.restore(json.loads(self._stored))
        for tenant, weight in self._weights.items():
            self.share.set_weight(tenant, weight)
        for name in sorted(self.share.ledger.replicas - self._replicas.keys()):
            self.share.remove_replica(name)
        for name in self._replicas:
            self.share.add_replica(name)

    def _new_share(self) -> FairShare:
        share = FairShare(FairCounters(credit=self._credit))
        if not self.life:
            for tenant, weight in self._weights.items():
                share.set_weight(tenant, weight)
        return share

    def _store(self, now_s: float) -> None:
        if self.settings.away is None or self.settings.store_interval_s is None or self.life:
            return  # nobody will ask for it
        if now_s >= self._next_store_s:
            self._next_store_s = now_s + self.settings.store_interval_s
            self._stored = json.dumps(self.share.state())


def _name(replica: Replica) -> str:
    return f"replica-{replica.number}"
