"""One life of a replica as far as its reports have told: totals that only grow, and who waits and runs there.

Rules:
- Totals are raised to the larger of what is known and what is said, part by part; the difference is what a report adds.
- An account that is forgotten takes its total out of its tenant's sum; whoever forgets it keeps that elsewhere.
"""

from dataclasses import dataclass, field

from cost_service.charges import NOTHING, Account, Served
from cost_service.service_messages import AccountReport


@dataclass(slots=True)
class Epoch:
    """One life of a replica."""

    sequence: int = -1
    totals: dict[Account, Served] = field(default_factory=dict)
    """Of the accounts that the engine has not forgotten."""

    tenants: dict[str, Served] = field(default_factory=dict)
    """Sums of the totals by tenant."""

    present: dict[Account, AccountReport] = field(default_factory=dict)
    """Lines of the accounts that wait, run or have something reserved."""

    eras: dict[Account, int] = field(default_factory=dict)
    """Of the accounts that are not in their first."""

    forgot_at: int = -1
    """The newest report when an account was forgotten last."""

    def note(self, account: Account, line: AccountReport) -> None:
        """Take the gauges of a newest report in."""
        if line.num_waiting or line.num_running or line.reserved:
            self.present[account] = line
        else:
            self.present.pop(account, None)

    def raise_to(self, account: Account, total: Served) -> Served | None:
        """Take a total in, and return what it adds; None if nothing."""
        before = self.totals.get(account)
        if before is None:
            self.totals[account] = added = total
            if added == NOTHING:
                return None
        elif before == total:
            return None
        else:
            a, b, c, d = total
            e, f, g, h = before
            if a < e or b < f or c < g or d < h:
                total = before.largest(total)
                if total == before:
                    return None
                a, b, c, d = total
            self.totals[account] = total
            added = _new(Served, (a - e, b - f, c - g, d - h))
        add_to(self.tenants, account[0], added)
        return added

    def forget(self, account: Account) -> Served:
        """Forget an account; returns its total, which the tenant's loses."""
        total = self.totals.pop(account, NOTHING)
        self.eras.pop(account, None)
        if total != NOTHING:
            left = self.tenants[account.tenant].minus(total)
            if left == NOTHING:
                del self.tenants[account.tenant]
            else:
                self.tenants[account.tenant] = left
        return total


def add_to(sums: dict[str, Served], tenant: str, served: Served) -> None:
    """Add to a tenant's sum, for thousands of lines a second; who was served last stands last."""
    before = sums.pop(tenant, None)
    if before is None:
        sums[tenant] = served
    else:
        a, b, c, d = before
        e, f, g, h = served
        sums[tenant] = _new(Served, (a + e, b + f, c + g, d + h))


_new = tuple.__new__
