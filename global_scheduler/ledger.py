"""What every replica has delivered, merged from cumulative totals: nothing is lost, and nothing counts twice.

Rules:
- A report holds totals since the engine's epoch (its life) began, of those accounts that changed. Merging takes the larger
  total, so a report may be lost, repeated, late or out of order: a grow-only counter per (replica, epoch).
- What a merge adds is handed on once, as raw amounts, to be charged.
- Gauges (who waits and runs there now) are those of the report with the highest sequence; a report of another epoch with a
  sequence that is new for that epoch takes over, so that a late word of a dead engine lasts one interval at most. Every
  epoch has its own: whichever takes over, nothing of the other's stays, and nothing of its own is missing.
- A line of a higher era counts from nothing: the engine has forgotten the account, once all of it was answered and long idle
  (`replicas/tenant_service.py`). Its first total of nothing lets the ledger forget the account, too. What comes late is not
  taken for a line of a new era: of an account that is unknown, a report says nothing that a later one did not say.
- An epoch is over once `KEPT_EPOCHS` others of its replica have reported since, or the replica is removed. It is folded into
  sums by tenant, and its name is remembered (the last `REMEMBERED_EPOCHS` of a replica, of the last `REMEMBERED_REPLICAS`):
  whatever still arrives of it is refused, not counted again.
- Tenants beyond `max_tenants` whom no engine knows any more have one sum together.
- Conservation: for each tenant, what was handed on is what the replicas delivered, to the token; `check` holds it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from cost_service.charges import NOTHING, Account, Served
from cost_service.service_messages import AccountReport, Report
from global_scheduler.epoch import Epoch, add_to

KEPT_EPOCHS = 3
REMEMBERED_EPOCHS = 256
REMEMBERED_REPLICAS = 1024

MAX_TENANTS = 100_000
"""Tenants whose sums are kept; a tenth more of those whom engines know."""

ABSENT = AccountReport(served=NOTHING)
"""Who neither waits nor runs."""


NO_EPOCHS: Mapping[str, Epoch] = {}
NO_EPOCH = Epoch()
"""Of whom nothing is known; nothing is ever added to it."""


class UnknownReplicaError(ValueError):
    """A report from a replica that nobody announced, or that was removed."""


class Ledger:
    """Raw totals of one pool."""

    def __init__(self, *, max_tenants: int = MAX_TENANTS) -> None:
        self.max_tenants = self._most_tenants = max_tenants
        self.forgotten = NOTHING
        """What tenants were given whose own sums were put together."""
        self._replicas: dict[str, OrderedDict[str, Epoch]] = {}
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
        epoch = epochs.setdefault(report.epoch, Epoch())
        newest = report.sequence > epoch.sequence
        if newest:
            epoch.sequence = report.sequence
            self._current[report.replica] = report.epoch
            epochs.move_to_end(report.epoch)
            for account, line in report.accounts.items():
                epoch.note(account, line)
        added: dict[Account, Served] = {}
        for account, line in self._lines_of_now(epoch, report):
            if (served := epoch.raise_to(account, line.served)) is not None:
                added[account] = served
                add_to(self._delivered, account[0], served)
        while len(epochs) > KEPT_EPOCHS:
            self._fold(report.replica, next(iter(epochs)))
        if len(self._delivered) > self._most_tenants:
            self._forget_tenants()
        return added, newest

    def epoch(self, replica: str, epoch: str) -> Epoch:
        """One life of a replica, to be read; an empty one if nothing of it is merged."""
        return self._replicas.get(replica, NO_EPOCHS).get(epoch, NO_EPOCH)

    def total_of_tenant(self, replica: str, epoch: str, tenant: str) -> Served:
        """What a tenant was given in one life of a replica, as far as it is merged."""
        return self.epoch(replica, epoch).tenants.get(tenant, NOTHING)

    def total(self, replica: str, epoch: str, account: Account) -> Served:
        """The same of one of its users."""
        return self.epoch(replica, epoch).totals.get(account, NOTHING)

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
            "forgotten": list(self.forgotten),
            "delivered": {tenant: list(served) for tenant, served in self._delivered.items()},
            "folded": {tenant: list(served) for tenant, served in self._folded.items()},
            "over": {replica: list(epochs) for replica, epochs in self._over.items()},
            "replicas": {
                replica: {
                    name: {
                        "sequence": epoch.sequence,
                        "forgot_at": epoch.forgot_at,
                        "lines": [
                            [
                                *account,
                                *served,
                                line.num_waiting,
                                line.num_running,
                                line.reserved,
                                epoch.eras.get(account, 0),
                            ]
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
        ledger.forgotten = Served(*state["forgotten"])
        ledger._delivered = {tenant: Served(*served).checked(tenant) for tenant, served in state["delivered"].items()}
        ledger._folded = {tenant: Served(*served).checked(tenant) for tenant, served in state["folded"].items()}
        ledger._over.update((replica, OrderedDict.fromkeys(epochs)) for replica, epochs in state["over"].items())
        for replica, epochs in state["replicas"].items():
            ledger.add_replica(replica)
            for name, epoch in epochs.items():
                restored = ledger._replicas[replica][name] = Epoch(epoch["sequence"], forgot_at=epoch["forgot_at"])
                lines = {
                    Account(tenant, user): AccountReport(
                        served=Served(*served), num_waiting=waiting, num_running=running, reserved=reserved, era=era
                    )
                    for tenant, user, *served, waiting, running, reserved, era in epoch["lines"]
                }
                report = Report(replica=replica, epoch=name, sequence=epoch["sequence"], accounts=lines).checked()
                for account, line in report.accounts.items():
                    restored.raise_to(account, line.served)
                    restored.note(account, line)
                    if line.era:
                        restored.eras[account] = line.era
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
            self._put_away(tenant, served)
        self._remember(replica, name)

    def _lines_of_now(self, epoch: Epoch, report: Report) -> Iterable[tuple[Account, AccountReport]]:
        """The lines whose totals are to be taken in: not those of eras that are over, nor of accounts that are forgotten."""
        lines = report.accounts.items()
        if epoch.forgot_at < 0 and not epoch.eras and not any(line.era for _, line in lines):
            return lines  # as in most engines, where nobody was ever forgotten
        kept: list[tuple[Account, AccountReport]] = []
        forgot_at = epoch.forgot_at
        for account, line in lines:
            era = epoch.eras.get(account, 0)
            if report.sequence <= epoch.forgot_at if account not in epoch.totals else line.era < era:
                continue
            if line.era > era:
                self._put_away(account.tenant, epoch.forget(account))
                epoch.eras[account] = line.era
            if (
                line.era
                and line.served == NOTHING == epoch.totals.get(account, NOTHING)
                and account not in epoch.present
            ):
                epoch.forget(account)
                forgot_at = epoch.sequence
            else:
                kept.append((account, line))
        epoch.forgot_at = forgot_at
        return kept

    def _forget_tenants(self) -> None:
        """Put tenants' sums together whom no engine knows any more, those first who were served least lately."""
        for tenant in list(self._delivered):
            if len(self._delivered) <= self.max_tenants * 0.9:
                break
            if not any(tenant in epoch.tenants for epochs in self._replicas.values() for epoch in epochs.values()):
                assert self._folded.pop(tenant, NOTHING) == self._delivered[tenant], f"totals of {tenant!r}"
                self.forgotten = self.forgotten.plus(self._delivered.pop(tenant))
        self._most_tenants = max(self.max_tenants, len(self._delivered) * 11 // 10)

    def _put_away(self, tenant: str, served: Served) -> None:
        """Keep what has no account any more as part of the tenant's sum."""
        if served != NOTHING:
            self._folded[tenant] = self._folded.get(tenant, NOTHING).plus(served)

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
