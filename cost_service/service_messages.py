"""What replicas and the fairness scheduler tell each other: cumulative totals one way, absolute counters the other.

Plain values that any encoding carries; neither side imports the other. Those that hold numbers alone are kept by the
thousands and can be in no cycle: the garbage collector leaves them out.
"""

from collections.abc import Mapping

import msgspec

from cost_service.charges import MAX_COUNT, Account, Served


class AccountReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One account at one replica."""

    served: Served
    """Since the epoch began."""

    num_waiting: int = 0
    num_running: int = 0
    reserved: float = 0.0
    """Service that running requests are predicted to get and have not had yet."""

    era: int = 0
    """Which of the account's records in this epoch the total is of: it rises when the engine has forgotten the account and
    counts anew from nothing. A first total of nothing says that the account is forgotten, and is all that is said of it."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says at an interval."""

    replica: str
    epoch: str
    """Names this life of the engine."""

    sequence: int
    """Rises by one with every report of the epoch."""

    accounts: Mapping[Account, AccountReport]
    """Those that changed since the last report that was answered; all of them in a first one."""

    def checked(self) -> "Report":
        """Return it if its numbers are possible.

        Raises:
            ValueError: A number is out of range; the message names it.
        """
        if not _are_counts((self.sequence,)):
            _check_count("sequence", self.sequence, self.replica)
        for account, report in self.accounts.items():
            gauges = (report.num_waiting, report.num_running, report.era)
            if not (_are_counts(report.served) and _are_counts(gauges) and 0.0 <= report.reserved < MAX_COUNT):
                where = f"{account.tenant!r}/{account.user!r} at {self.replica!r}"
                report.served.checked(where)
                for name, value in zip(("num_waiting", "num_running", "era"), gauges, strict=True):
                    _check_count(name, value, where)
                raise ValueError(f"reserved of {where} is {report.reserved!r}; it must be a number from 0 up to 2^53.")
        return self


class Known(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A counter, and how much service of the asking replica's own is in it (not normalised)."""

    counter: float
    included: float


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica is told of a tenant."""

    tenant: str
    known: Known
    """Normalised service in the cluster, with what is reserved for the tenant at other replicas."""

    weight: float
    waits: bool
    """Whether it waits at any replica, as far as the cluster knows: if so, waiting here is no return."""

    users: dict[str, Known] = {}
    """None where a tenant has one user alone: there is nothing to order."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica is told at an interval."""

    version: int
    """To be named when it reports next."""

    shares: list[Share]


def _are_counts(values: tuple[int, ...]) -> bool:
    """Whether all are integers from 0 up to 2^53; for thousands of lines a second, names come later."""
    for value in values:  # noqa: SIM110 `all` takes twice as long
        if type(value) is not int or not 0 <= value < MAX_COUNT:
            return False
    return True


def _check_count(field_name: str, value: int, where: str) -> None:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ValueError(f"{field_name} of {where} is {value!r}; it must be an integer from 0 up to 2^53.")
