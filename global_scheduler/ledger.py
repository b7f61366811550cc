"""What every replica has delivered, merged from cumulative totals: nothing is lost, and nothing counts twice.

Rules:
- A report holds totals since the engine's epoch (its life) began, of those accounts that changed. Merging takes the larger
  total, so a report may be lost, repeated, late or out of order: a grow-only counter per (replica, epoch).
- What a merge adds is handed on once, as raw amounts, to be charged.
- Gauges (who waits and runs there now) are those of the report with the highest sequence; a report of another epoch with a
  sequence that is new for that epoch takes over, so that a late word of a dead engine lasts one interval at most. Every
  epoch has its own: whichever takes over, nothing of the other's stays, and nothing of its own is missing.
- An epoch is over once `KEPT_EPOCHS` others of its replica have reported since, or the replica is removed. It is folded into
  sums by tenant, and its name is remembered (the last `REMEMBERED_EPOCHS` of a replica, of the last `REMEMBERED_REPLICAS`):
  whatever still arrives of it is refused, not counted again.
- Conservation: for each tenant, what was handed on is what the replicas delivered, to the token; `check` holds it.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cost_service.charges import NOTHING, Account, Served
from cost_service.service_messages import AccountReport, Report

KEPT_EPOCHS = 3
REMEMBERED_EPOCHS = 256
REMEMBERED_REPLICAS = 1024

ABSENT = AccountReport(served=NOTHING)
"""Who neither waits nor runs."""


@dataclass(slots=True)
class _Epoch:
    sequence: int = -1
    totals: dict[Account, Served] = field(default_factory=dict)
    tenants: dict[str, Served] = field(default_factory=dict)
    """Sums of the totals by tenant."""

    present: dict[Account, AccountReport] = field(default_factory=dict)
    """Lines of the accounts that wait, run or have something reserved."""

    def note(self, account: Account, line: AccountReport) -> None:
        """Take the gauges of a newest report in."""
        if line.num_waiting or line.num_running or line.reserved:
            self.present[account] = line
        else:
            self.present.pop(account, None)

    def raise_to(self, account: Account, total: Served) -> Served:
        """Take a total in, and return what it adds."""
        before = self.totals.get(account, NOTHING)
        self.totals[account] = after = before.largest(total)
        added = after.minus(before)
        self.tenants[account.tenant] = self.tenants.get(account.tenant, NOTHING).plus(added)
        return added


NO_EPOCHS: Mapping[str, _Epoch] = {}


class UnknownReplicaError(ValueError):
    """A report from a replica that nobody announced, or that was removed."""


class Ledger:
    """Raw totals of one pool."""

    def __init__(self) -> None:
        self._replicas: dict[str, OrderedDict[str, _Epoch]] = {}
        self._current: dict[str, str] = {}  # the epoch whose gauges hold
        self._over: OrderedDict[str, OrderedDict[str, None]] = (
            OrderedDict()
        )  # epochs that are folded; survives the replica's removal
        self._folded: dict[str, Served] = {}
        self._delivered: dict[str, Served] = {}
        self.num_refused = 0
        """Reports of epochs that were over."""

    @property
    def replicas(self) -> frozenset[str]:
        return frozenset(self._replicas)

    def add_replica(self, replica: str) -> None:
        """Expect reports of a replica; a known one stays as it is."""
        self._replicas.setdefault(replica, OrderedDict())

    def remove_replica(self, replica: str) -> None:
        """Expect none any more; what it delivered stays counted."""
        for epoch in list(self._replicas.get(replica, ())):
            self._fold(replica, epoch)
        self._replicas.pop(replica, None)
        self._current.pop(replica, None)

    def merge(self, report: Report) -> tuple[dict[Account, Served], bool]:
        """Merge a report.

        Returns:
            What it adds by account, and whether its gauges are the newest of the replica.

        Raises:
            ValueError: A number in it is impossible; nothing is merged then.
            UnknownReplicaError: Nobody announced the replica.
        """
        epochs = self._replicas.get(report.replica)
        if epochs is None:
            raise UnknownReplicaError(f"Replica {report.replica!r} is unknown; it must be announced before it reports.")
        report.checked()
        if report.epoch in self._over.get(report.replica, ()):
            self.num_refused += 1
            return {}, False
        epoch = epochs.setdefault(report.epoch, _Epoch())
        newest = report.sequence > epoch.sequence
        epoch.sequence = max(epoch.sequence, report.sequence)
        if newest:
            self._current[report.replica] = report.epoch
            epochs.move_to_end(report.epoch)
            for account, line in report.accounts.items():
                epoch.note(account, line)
        added = {account: epoch.raise_to(account, line.served) for account, line in report.accounts.items()}
        for account, served in added.items():
            self._delivered[account.tenant] = self.delivered(account.tenant).plus(served)
        while len(epochs) > KEPT_EPOCHS:
            self._fold(report.replica, next(iter(epochs)))
        return {account: served for account, served in added.items() if served != NOTHING}, newest

    def total_of_tenant(self, replica: str, epoch: str, tenant: str) -> Served:
        """What a tenant was given in one life of a replica, as far as it is merged."""
        known = self._replicas.get(replica, NO_EPOCHS).get(epoch)
        return NOTHING if known is None else known.tenants.get(tenant, NOTHING)

    def total(self, replica: str, epoch: str, account: Account) -> Served:
        """The same of one of its users."""
        known = self._replicas.get(replica, NO_EPOCHS).get(epoch)
        return NOTHING if known is None else known.totals.get(account, NOTHING)

    def knows(self, replica: str, epoch: str) -> bool:
        """Whether a report of that epoch was merged."""
        return epoch in self._replicas.get(replica, ())

    def current(self, replica: str) -> str | None:
        """The epoch whose gauges hold."""
        return self._current.get(replica)

    def present(self, replica: str) -> Mapping[Account, AccountReport]:
        """The accounts that wait, run or have something reserved there, by the gauges that hold."""
        current = self.current(replica)
        return {} if current is None else self._replicas[replica][current].present

    def delivered(self, tenant: str) -> Served:
        """All that a tenant was given."""
        return self._delivered.get(tenant, NOTHING)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {
            "delivered": {tenant: list(served) for tenant, served in self._delivered.items()},
            "folded": {tenant: list(served) for tenant, served in self._folded.items()},
            "over": {replica: list(epochs) for replica, epochs in self._over.items()},
            "replicas": {
                replica: {
                    name: {
                        "sequence": epoch.sequence,
                        "lines": [
                            [*account, *served, line.num_waiting, line.num_running, line.reserved]
                            for account, served in epoch.totals.items()
                            for line in [epoch.present.get(account, ABSENT)]
                        ],
                    }
                    for name, epoch in epochs.items()
                }
                for replica, epochs in self._replicas.items()
            },
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Ledger":
        """Go on from a stored state.

        Raises:
            ValueError: A stored total is impossible, or tenants' totals are not the sums of their accounts'.
        """
        ledger = cls()
        ledger._delivered = {tenant: Served(*served).checked(tenant) for tenant, served in state["delivered"].items()}
        ledger._folded = {tenant: Served(*served).checked(tenant) for tenant, served in state["folded"].items()}
        ledger._over.update((replica, OrderedDict.fromkeys(epochs)) for replica, epochs in state["over"].items())
        for replica, epochs in state["replicas"].items():
            ledger.add_replica(replica)
            for name, epoch in epochs.items():
                restored = ledger._replicas[replica][name] = _Epoch(epoch["sequence"])
                lines = {
                    Account(tenant, user): AccountReport(
                        served=Served(*served), num_waiting=waiting, num_running=running, reserved=reserved
                    )
                    for tenant, user, *served, waiting, running, reserved in epoch["lines"]
                }
                report = Report(replica=replica, epoch=name, sequence=epoch["sequence"], accounts=lines).checked()
                for account, line in report.accounts.items():
                    restored.raise_to(account, line.served)
                    restored.note(account, line)
                ledger._current[replica] = name
        wrong = ledger._unbalanced()
        if wrong is not None:
            raise ValueError(f"The stored totals of {wrong!r} do not add up; the state is damaged.")
        return ledger

    def check(self) -> None:
        """Assert conservation and bounds; O(accounts)."""
        wrong = self._unbalanced()
        assert wrong is None, f"totals of {wrong!r} do not add up"
        for replica, epochs in self._replicas.items():
            assert len(epochs) <= KEPT_EPOCHS, f"{replica} has {len(epochs)} epochs"
            assert not set(epochs) & set(self._over.get(replica, ())), f"{replica} has an epoch that is over"
        assert all(len(epochs) <= REMEMBERED_EPOCHS for epochs in self._over.values())

    def _fold(self, replica: str, name: str) -> None:
        for tenant, served in self._replicas[replica].pop(name).tenants.items():
            self._folded[tenant] = self._folded.get(tenant, NOTHING).plus(served)
        self._remember(replica, name)

    def _remember(self, replica: str, epoch: str) -> None:
        over = self._over.setdefault(replica, OrderedDict())
        over[epoch] = None
        self._over.move_to_end(replica)
        while len(over) > REMEMBERED_EPOCHS:
            over.popitem(last=False)
        while len(self._over) > REMEMBERED_REPLICAS:
            self._over.popitem(last=False)

    def _unbalanced(self) -> str | None:
        """A tenant whose total is not the sum of its parts, or None."""
        sums = dict(self._folded)
        for epochs in self._replicas.values():
            for epoch in epochs.values():
                for account, served in epoch.totals.items():
                    sums[account.tenant] = sums.get(account.tenant, NOTHING).plus(served)
        names = sums.keys() | self._delivered.keys()
        return next((name for name in sorted(names) if sums.get(name, NOTHING) != self.delivered(name)), None)
