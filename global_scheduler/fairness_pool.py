"""One pool of replicas as the fairness scheduler sees it: what they report, what they are told, gap and bound.

Rules:
- A replica is announced by its first well-formed report. What arrives from one that was answered by another life of the
  scheduler is taken only where it cannot be charged twice, and everything is asked for.
- A replica that was silent for `SILENT_S` has nobody waiting and nothing reserved any more; what it delivered stays, and
  when it is back it tells everything. After `FORGET_S` it is removed, and its engine's epoch is over for good.
- Gap and bound are of what the reports say, whose order between replicas is that of their arrival. What a report of
  everything adds was served at an unknown time: it is charged, and held against nobody as a gap.
- The bound assumes that the service of a token is at most its weight. Where service is counted in seconds of engine time,
  nothing says how many a token takes at most: there no bound is stated, and no gap.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cost_service.charges import SYSTEM, ServiceKind, ServiceUnit
from cost_service.service_messages import (
    ENGINE_INTERVAL_S,
    UNTOLD,
    AccountReport,
    FairnessAnswer,
    FairnessReport,
    ReplicaLimits,
    Report,
)
from global_scheduler.bound import FairnessBound, VictimRule, fairness_bound
from global_scheduler.fair_share import FairShare, absent_s
from global_scheduler.fairness_checker import FairnessChecker, Gap

SILENT_S, FORGET_S = 10.0, 600.0


class OverError(ValueError):
    """A report of an engine's life that is over: what it delivered is counted already."""


@dataclass(slots=True)
class _Replica:
    epoch: str
    sequence: int
    seen_s: float
    limits: ReplicaLimits | None = None
    fair_victims: bool = True
    round_trip_s: float = 0.0
    bypass_service: float = 0.0
    silent: bool = False


@dataclass(slots=True, kw_only=True)
class PoolFigures:
    """How a pool stands."""

    gap: Gap | None
    bound: FairnessBound | None
    worst_ratio: float | None
    """The largest share of the bound that any tenant has ever strayed by, in this life."""

    served: Mapping[str, float]
    """Service by tenant that was reported in this life of the scheduler."""

    num_replicas: int
    """Those that are not silent."""

    @property
    def stated(self) -> float | None:
        """The bound of the two tenants that the gap is of; of two that weigh 1 where nobody waits."""
        if self.gap is None or self.bound is None:
            return None
        return self.gap.bound if self.gap.tenants else self.bound.pair(1.0, 1.0)


class FairnessPool:
    """Fairness state of one pool, with its replicas."""

    def __init__(self, service: ServiceKind) -> None:
        self.share = FairShare(unit=ServiceUnit(service))
        self.served: dict[str, float] = {}
        """Service by tenant that was reported in this life of the scheduler."""
        self._replicas: dict[str, _Replica] = {}
        self._tenants: set[str] = set()  # that were ever served
        self._checker: FairnessChecker | None = None
        self._interval_s = 0.0
        self._restored = False

    @property
    def num_replicas(self) -> int:
        """Those that are not silent."""
        return sum(not each.silent for each in self._replicas.values())

    @property
    def seen_s(self) -> float:
        """When a replica was heard last; 0 if none ever was."""
        return max((each.seen_s for each in self._replicas.values()), default=0.0)

    def set_weight(self, tenant: str, weight: float) -> None:
        """Charge a tenant by another weight from now on.

        Raises:
            ValueError: The weight is out of range.
        """
        if weight != self.share.counters.tenants.weight(tenant):
            self.share.set_weight(tenant, weight)
            if self._checker is not None:
                self._checker.set_weight(tenant, weight)

    def exchange(
        self, told: FairnessReport, report: Report, *, life: str, now_s: float, interval_s: float
    ) -> FairnessAnswer:
        """Take a replica's report and return what it is to know.

        Args:
            told: The message, which has been checked.
            report: What it says, of the engine.
            life: Names this life of the scheduler.
            interval_s: That the replica is to keep.

        Raises:
            ValueError: The report is impossible, or of an engine's life that is over; nothing has changed then.
        """
        replica, ledger, self._interval_s = told.replica, self.share.ledger, interval_s
        record = self._replicas.get(replica)
        was_answered_elsewhere = told.life not in ("", life)
        is_back = record is not None and record.silent
        wants_everything = (was_answered_elsewhere or is_back) and told.known is None
        answered = 0
        self.share.add_replica(replica)
        knows = ledger.knows(replica, told.epoch)
        if told.sequence and (knows or self._restored or not wants_everything):
            known = told.known if told.life else None
            try:
                self._take(report, known, is_beginning=known is not None and not knows and not self._restored)
            except OverError:
                if record is None:
                    self.share.remove_replica(replica)
                raise
            answered = told.sequence
        self._note_replica(told, now_s, stays_silent=is_back and wants_everything)
        since = told.version if told.life == life and not is_back else UNTOLD
        answer = self.share.answer(replica, told.epoch, since=since, named=report.accounts)
        return FairnessAnswer(
            life=life, version=answer.version, shares=answer.shares, answered=answered,
            wants_everything=wants_everything, interval_s=interval_s,
        )  # fmt: skip

    def tick(self, now_s: float) -> None:
        """Let go who is silent, and state the bound of those who are not."""
        for name, record in list(self._replicas.items()):
            if now_s - record.seen_s > FORGET_S:
                waiting = self._tenants_at(name)
                self.share.remove_replica(name)
                del self._replicas[name]
                self._note_waiting(waiting)
            elif now_s - record.seen_s > SILENT_S and not record.silent:
                self._silence(name, record)
        self._state_bound()

    def figures(self) -> PoolFigures:
        """Gap, bound and service; O(tenants)."""
        checker = self._checker
        if checker is None:
            return PoolFigures(
                gap=None, bound=None, worst_ratio=None, served=self.served, num_replicas=self.num_replicas
            )
        return PoolFigures(
            gap=checker.gap(), bound=checker.bound, worst_ratio=checker.worst.stray, served=self.served,
            num_replicas=self.num_replicas,
        )  # fmt: skip

    def status(self, max_tenants: int) -> dict[str, Any]:
        """Figures by tenant as JSON values, of those who were served most; shares are of all that was ever delivered."""
        share, tenants = self.share, self.share.counters.tenants
        figures = self.figures()
        service = {name: share.unit.service(share.ledger.delivered(name)) for name in self._tenants}
        waiting: dict[str, int] = {}
        for name in self._replicas:
            for account, line in share.ledger.present(name).items():
                waiting[account.tenant] = waiting.get(account.tenant, 0) + line.num_waiting
        total = sum(service.values())
        return {
            "replicas": sorted(name for name, record in self._replicas.items() if not record.silent),
            "service": share.unit.kind.value,
            "gap": figures.gap.gap if figures.gap else None,
            "bound": figures.stated,
            "gap_of_bound": figures.gap.ratio if figures.gap else None,
            "worst_of_bound": figures.worst_ratio,
            "bound_terms": str(figures.bound) if figures.bound else None,
            "num_tenants": len(service),
            "tenants": [
                {
                    "tenant": name,
                    "service": service[name],
                    "share": service[name] / total if total else 0.0,
                    "waiting": waiting.get(name, 0),
                    "weight": tenants.weight(name),
                    "delivered": share.ledger.delivered(name)._asdict(),
                }
                for name in sorted(service, key=lambda name: (-service[name], name))[:max_tenants]
            ],
        }

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return self.share.state()

    def restore(self, state: Mapping[str, Any], now_s: float) -> None:
        """Go on from a stored state; only where nothing has happened yet. Its replicas are expected from now on.

        Raises:
            ValueError: The state is damaged.
        """
        try:
            self.share.restore(state)
            for name, epochs in state["ledger"]["replicas"].items():
                epoch = self.share.ledger.current(name)
                sequence = -1 if epoch is None else epochs[epoch]["sequence"]
                self._replicas[name] = _Replica(epoch or "", max(0, sequence), now_s)
            self._tenants = set(state["ledger"]["delivered"]) - {SYSTEM}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"The state is not one of a pool ({type(error).__name__}: {error}).") from None
        self._restored = True

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        self.share.check()
        assert self._replicas.keys() >= self.share.ledger.replicas, "a replica is expected that nobody has seen"

    def _take(self, report: Report, known: Mapping[str, float] | None, *, is_beginning: bool) -> None:
        share, ledger = self.share, self.share.ledger
        tenants = {account.tenant for account in report.accounts} - {SYSTEM}
        before = {name: ledger.delivered(name) for name in tenants}
        others = self._tenants_at(report.replica) if ledger.current(report.replica) != report.epoch else set()
        num_refused = ledger.num_refused
        share.take(report, known=known)
        if ledger.num_refused > num_refused:
            raise OverError(f"Epoch {report.epoch!r} of replica {report.replica!r} is over.")
        self._tenants |= tenants
        for name in tenants:
            service = share.unit.service(ledger.delivered(name).minus(before[name]))
            if service > 0.0 and not is_beginning:
                self.served[name] = self.served.get(name, 0.0) + service
            if service > 0.0 and known is None and self._checker is not None:
                self._checker.serve(name, service)
        self._note_waiting(tenants | others)

    def _note_waiting(self, tenants: Iterable[str]) -> None:
        if self._checker is not None:
            for name in tenants:
                self._checker.set_waiting(name, self.share.counters.tenants.is_waiting(name))

    def _note_replica(self, told: FairnessReport, now_s: float, *, stays_silent: bool) -> None:
        record = self._replicas.get(told.replica)
        if record is None or record.epoch != told.epoch:
            record = self._replicas[told.replica] = _Replica(told.epoch, told.sequence, now_s)
        counts_anew = record.limits is None or (record.silent and not stays_silent)
        record.seen_s, record.silent = now_s, stays_silent
        record.sequence = max(record.sequence, told.sequence)
        record.limits, record.fair_victims, record.round_trip_s = told.limits, told.fair_victims, told.round_trip_s
        record.bypass_service = told.bypass_service
        if counts_anew:
            self._state_bound()

    def _state_bound(self) -> None:
        """State the bound of the replicas as they are now, and let nobody be lifted by more than that."""
        live = [each for each in self._replicas.values() if each.limits is not None and not each.silent]
        if not live or self.share.unit.kind is not ServiceKind.TOKENS:
            return
        fair, round_trip_s = all(each.fair_victims for each in live), max(each.round_trip_s for each in live)
        bound = fairness_bound(
            [each.limits for each in live if each.limits is not None],
            max_input_tokens=max(each.limits.max_tokens for each in live if each.limits is not None),
            # What an engine did lies with it for its own interval before it is told.
            interval_s=self._interval_s + ENGINE_INTERVAL_S, round_trip_s=round_trip_s,
            absent_s=absent_s(self.share.num_changed, self._interval_s + round_trip_s),
            input_weight=self.share.unit.input_weight, output_weight=self.share.unit.output_weight,
            num_granted_tokens=max(each.bypass_service for each in live) / self.share.unit.output_weight,
            victims=VictimRule.MOST_SERVED if fair else VictimRule.LAST_COME,
        )  # fmt: skip
        self.share.counters.tenants.credit = bound.credit
        if self._checker is not None:
            self._checker.bound = bound
            return
        self._checker = FairnessChecker(bound)
        for name in self.share.counters.tenants:
            self._checker.set_weight(name, self.share.counters.tenants.weight(name))
        self._note_waiting(self.share.counters.tenants)

    def _silence(self, name: str, record: _Replica) -> None:
        """Have a report say that nobody waits or runs at a replica any more."""
        ledger, epoch = self.share.ledger, self.share.ledger.current(name)
        record.silent = True
        self.share.lose_touch(name)
        present = ledger.present(name)
        if epoch is not None and present:
            record.sequence += 1
            lines = {account: AccountReport(served=ledger.total(name, epoch, account)) for account in present}
            self._take(
                Report(replica=name, epoch=epoch, sequence=record.sequence, accounts=lines), None, is_beginning=False
            )
        self._note_waiting(self._tenants_at(name))

    def _tenants_at(self, replica: str) -> set[str]:
        return {account.tenant for account in self.share.ledger.present(replica)} - {SYSTEM}
