"""What every tenant and user has been served as far as one engine knows: the cluster's counters, and its own service since.

Rules:
- The key of a tenant is `counter + (total - included + held) / weight`: what the cluster last said, what this engine has
  served beyond it, and what the requests that it has admitted are still sure or predicted to get. A user's likewise.
- The cluster's word of a tenant that has no request here is kept as it came and taken when the tenant is asked for: of
  thousands of tenants few are here, and a step is not to wait for the others. Beyond `max_tenants` words the oldest go.
- Service is charged as it is given, raw, to totals that only grow; a charge uses up what is held for the request first.
- Who waits here and, as far as is known, nowhere else has come back: it is lifted to the least served who waits here, or to
  the last who did, until the cluster says what the lift is.
- A request that is taken out and put back within a step has waited all the time: vLLM does so with those that are not ready
  yet, in every step, and that must not cost a tenant its claim. Its tenant's next request is another matter: who has all of
  its requests admitted at once does not wait, and saves nothing up.
- A line of a report is said again until a report that had it is answered: any report may be lost.
- Swaps and recomputations are the system's, never a tenant's.
- A tenant has at most `max_users` accounts of users until it is forgotten; its further users share one.
- Tenants beyond `max_tenants` are forgotten, those first who have been idle longest: who has no request here, of whom the
  scheduler has answered all, and whom for `IDLE_REPORTS` reports nothing has changed of, so that no stored state lacks it.
  Who comes back is counted from nothing, as a new era of its account, and lifted as a newcomer until the cluster says what
  its counter is. While the scheduler is away, what it does not know is kept. Where nobody asks for reports, nobody waits
  for an answer.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cost_service.charges import NOTHING, OTHER_USERS, SYSTEM, Account, Served, ServiceUnit, checked_weight
from cost_service.service_messages import AccountReport, Share
from replicas.standing import FRACTION, Group, Standing

MAX_USERS = 64
MAX_TENANTS = 16384
IDLE_REPORTS = 600
"""A minute of reports: many times what lies between two stored states of the scheduler."""


def _exact(service: float) -> float:
    """Round down to a fraction of 2, whose sums are exact: what is held and given back leaves nothing.

    Down, since a charge uses up what is held: a key must not fall by it.
    """
    return math.floor(service * FRACTION) / FRACTION


@dataclass(slots=True)
class _Payer:
    """An account with what it is at one engine."""

    tenant: Standing
    user: Standing
    era: int = 0
    served: Served = NOTHING
    num_running: int = 0
    held: float = 0.0

    def hold(self, service: float) -> None:
        self.held += service
        self.tenant.held += service
        self.user.held += service


@dataclass(slots=True)
class _Hold:
    account: Account
    service: float


class TenantService:
    """Service of tenants and users at one engine."""

    def __init__(
        self, unit: ServiceUnit | None = None, *, max_users: int = MAX_USERS, max_tenants: int = MAX_TENANTS,
        idle_reports: int = IDLE_REPORTS,
    ) -> None:  # fmt: skip
        """Begin with nobody.

        Args:
            max_users: Accounts of users that a tenant may have beside the one which its further users share.
            max_tenants: Tenants that are remembered beside those that may not be forgotten; see the rules.
            idle_reports: See `IDLE_REPORTS`.
        """
        self.unit = unit or ServiceUnit()
        self.max_users, self.max_tenants, self.idle_reports = max_users, max_tenants, idle_reports
        self._tenants = Group()
        self._users: dict[str, Group] = {}
        self._payers: dict[Account, _Payer] = {}
        self._holds: dict[str, _Hold] = {}
        self._waits_elsewhere: set[str] = set()
        self._heard: dict[str, Share] = {}  # of tenants that have no request here
        self._dirty: dict[Account, None] = {}  # in order, so that the same history gives the same reports
        self._unanswered: dict[Account, int] = {}  # the first report that says how an account is now
        self._taken: set[str] = set()  # requests that were taken out in this step
        self._fell: list[Callable[[Account], None]] = []
        self.total = 0.0
        """Service that all tenants were given."""
        self._last_use: dict[str, int] = {}  # tenants, who was used least lately first, and the report before that
        self._num_running: Counter[str] = Counter()  # by tenant
        self._forgotten: dict[Account, int] = {}  # accounts whose end is not answered yet, by the first report of it
        self._sequence = self._era = 0
        self._is_asked = False

    def watch(self, fell: Callable[[Account], None]) -> None:
        """Have a function called whenever keys of an account may have fallen; they rise without a word."""
        self._fell.append(fell)

    def account(self, tenant: str, user: str) -> Account:
        """Return the account that pays for a tenant's user: its own, or the one that further users share."""
        self._use(tenant)
        group = self._users.get(tenant)
        if group is None:
            group = self._users[tenant] = Group()
        users = group.standings
        if user not in users:
            user = user if len(users) - (OTHER_USERS in users) < self.max_users else OTHER_USERS
            users.setdefault(user, Standing())
        self._take_heard(tenant)
        return Account(tenant, user)

    def tenant_key(self, tenant: str) -> float:
        """Normalised service of a tenant: lower goes first."""
        if tenant in self._heard:
            self._take_heard(tenant)
        return self._tenants.key(tenant)

    def user_key(self, account: Account) -> float:
        """The same of a user among its tenant's."""
        group = self._users.get(account.tenant)
        return 0.0 if group is None else group.key(account.user)

    def weight(self, tenant: str) -> float:
        """What a tenant's service is divided by."""
        standing = self._tenants.standings.get(tenant)
        return 1.0 if standing is None else standing.weight

    def set_weight(self, tenant: str, weight: float) -> None:
        """Weigh a tenant's service by another weight from now on; it keeps its key.

        Raises:
            ValueError: The weight is out of range.
        """
        self._use(tenant)
        standing = self._tenants.of(tenant)
        key, standing.weight = standing.key, checked_weight(weight)
        standing.counter += key - standing.key
        self._tell_fell(tenant)

    def begin_step(self) -> None:
        """Let requests that were taken out before now have gone."""
        self._taken.clear()

    def arrives(self, account: Account, request_id: str = "") -> None:
        """Note a request that waits."""
        tenant, returns = account.tenant, request_id not in self._taken
        self._tenants.arrives(tenant, returns=returns and tenant not in self._waits_elsewhere)
        self._users[tenant].arrives(account.user, returns=returns)
        self._payer(account)

    def leaves(self, account: Account) -> None:
        """Note a request that waits no more."""
        self._tenants.leaves(account.tenant)
        self._users[account.tenant].leaves(account.user)
        self._dirty[account] = None

    def hold(self, request_id: str, account: Account, service: float) -> None:
        """Count service in advance: of a request that is admitted now."""
        assert service >= 0.0, f"{service} is held for {request_id}"
        assert request_id not in self._holds, f"{request_id} is admitted twice"
        self._taken.add(request_id)
        self._holds[request_id] = hold = _Hold(account, _exact(service))
        payer = self._payer(account)
        payer.num_running += 1
        self._num_running[account.tenant] += 1
        payer.hold(hold.service)

    def release(self, request_id: str) -> None:
        """Refund what is still held: the request has ended, was preempted, or was not admitted after all."""
        hold = self._holds.pop(request_id, None)
        if hold is not None:
            payer = self._payer(hold.account)
            payer.num_running -= 1
            self._num_running[hold.account.tenant] -= 1
            payer.hold(-hold.service)
            self._tell_fell(*hold.account)

    def reserve(self, request_id: str, service: float) -> None:
        """Hold so much for an admitted request from now on: its prompt is charged, and its output predicted or not."""
        hold, service = self._holds[request_id], _exact(service)
        self._payer(hold.account).hold(service - hold.service)
        hold.service = service
        self._tell_fell(*hold.account)

    def charge(self, request_id: str, account: Account, served: Served) -> None:
        """Count service that was given; the caller may sum up what an account got in a step, with no request's name."""
        payer = self._payer(account)
        payer.served = payer.served.plus(served)
        service = self.unit.service(served)
        payer.tenant.total += service
        payer.user.total += service
        if account.tenant != SYSTEM:
            self.total += service
        hold = self._holds.get(request_id)
        if hold is not None and hold.service > 0.0:
            used = min(_exact(service), hold.service)
            hold.service -= used
            payer.hold(-used)

    def charge_system(self, served: Served) -> None:
        """Count a recomputation or a swap."""
        self.charge("", Account(SYSTEM), served)

    def learn(self, *shares: Share) -> None:
        """Take the cluster's word of tenants."""
        heard, num_waiting, num_running = self._heard, self._tenants.num_waiting, self._num_running
        for share in reversed(shares):  # whose change is the latest comes first, and is forgotten last
            tenant = share.tenant
            if tenant in num_waiting or num_running.get(tenant) or tenant == self._tenants.last:
                self._take(share)
            else:
                heard.pop(tenant, None)
                heard[tenant] = share
        while len(heard) > self.max_tenants:
            del heard[next(iter(heard))]

    def _take_heard(self, tenant: str) -> None:
        if (share := self._heard.pop(tenant, None)) is not None:
            self._take(share)

    def _take(self, share: Share) -> None:
        tenant, confirmed = share.tenant, share.waits
        if tenant not in self._last_use:
            self._use(tenant)
        (self._waits_elsewhere.add if confirmed else self._waits_elsewhere.discard)(tenant)
        standing = self._tenants.of(tenant)
        before = standing.key
        if standing.weight != share.weight:
            standing.weight = checked_weight(share.weight)
        standing.learn(share.known, confirmed=confirmed)
        if standing.key < before:
            self._tell_fell(tenant)
        if share.users:
            self._take_users(share)

    def _take_users(self, share: Share) -> None:
        users = self._users.setdefault(share.tenant, Group()).standings
        for user in share.users.keys() & users.keys():
            before = users[user].key
            users[user].learn(share.users[user], confirmed=share.waits)
            if users[user].key < before:
                self._tell_fell(share.tenant, user)

    def take_report(self, sequence: int, *, everything: bool = False) -> dict[Account, AccountReport]:
        """Return the lines of a report: those that changed since the last that was answered, or all that there are."""
        self._sequence, self._is_asked = sequence, True
        self._unanswered.update(dict.fromkeys(self._dirty, sequence))
        self._dirty.clear()
        self._forget_idle()
        lines = {account: AccountReport(served=NOTHING, era=self._era) for account in self._forgotten}
        accounts = self._payers if everything else self._unanswered
        return lines | {account: self._line(account, self._payers[account]) for account in accounts}

    def answered(self, sequence: int) -> None:
        """Note that a report has arrived, and with it all that was said by then."""
        self._unanswered = {account: first for account, first in self._unanswered.items() if first > sequence}
        self._forgotten = {account: first for account, first in self._forgotten.items() if first > sequence}

    def known(self) -> Mapping[str, float]:
        """Counters by tenant as this engine knows them, for a scheduler that has lost its own."""
        standings = self._tenants.standings
        for name in [name for name in self._heard if name in standings]:
            self._take_heard(name)
        here = {name: standing.key - standing.held / standing.weight for name, standing in standings.items()}
        return {name: share.known.counter for name, share in self._heard.items()} | here

    def totals(self) -> Mapping[Account, Served]:
        """All that was given since the engine started."""
        return {account: payer.served for account, payer in self._payers.items()}

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        for tenant, standing in self._tenants.standings.items():
            held = sum(hold.service for hold in self._holds.values() if hold.account.tenant == tenant)
            assert abs(standing.held - held) <= 1e-6 * (1.0 + held), (
                f"{tenant!r} holds {standing.held}, its requests {held}"
            )
            users = self._users.get(tenant, Group())
            assert len(users.standings) <= self.max_users + 1, (
                f"{tenant!r} has {len(users.standings)} accounts of users"
            )
            assert users.num_waiting.total() == self._tenants.num_waiting[tenant], f"waiting requests of {tenant!r}"

    def _line(self, account: Account, payer: _Payer) -> AccountReport:
        num_waiting = self._users[account.tenant].num_waiting[account.user]
        return AccountReport(
            served=payer.served,
            num_waiting=num_waiting,
            num_running=payer.num_running,
            reserved=payer.held,
            era=payer.era,
        )

    def _payer(self, account: Account) -> _Payer:
        """Return the account's record, which is about to change."""
        self._dirty[account] = None
        self._use(account.tenant)
        payer = self._payers.get(account)
        if payer is None:
            users = self._users.setdefault(account.tenant, Group())
            payer = _Payer(self._tenants.of(account.tenant), users.of(account.user), self._era)
            self._payers[account] = payer
            self._forgotten.pop(account, None)
        return payer

    def _use(self, tenant: str) -> None:
        """Note that a tenant is used now: it stands last."""
        is_new = self._last_use.pop(tenant, None) is None
        self._last_use[tenant] = self._sequence
        if is_new and not self._is_asked:
            self._forget_idle()

    def _forget_idle(self) -> None:
        """Forget tenants beyond the most that are remembered, as far as they may be; see the rules."""
        num_beyond = len(self._last_use) - self.max_tenants
        if num_beyond <= 0:
            return
        asked = self._is_asked
        idle: list[str] = []
        for tenant, used in self._last_use.items():
            if len(idle) == num_beyond or (asked and used > self._sequence - self.idle_reports):
                break
            if not self._is_needed(tenant):
                idle.append(tenant)
        if idle:
            self._era += 1
        for tenant in idle:
            del self._last_use[tenant]
            self._num_running.pop(tenant, None)
            self._waits_elsewhere.discard(tenant)
            self._tenants.standings.pop(tenant, None)
            for user in self._users.pop(tenant, Group()).standings:
                account = Account(tenant, user)
                self._dirty.pop(account, None)
                if self._payers.pop(account, None) is not None and asked:
                    self._forgotten[account] = self._sequence

    def _is_needed(self, tenant: str) -> bool:
        """Whether a tenant has requests here, or something that the scheduler must be told."""
        is_last = tenant in (self._tenants.last, next(reversed(self._last_use)))  # to leave, and to be used
        if is_last or self._tenants.num_waiting[tenant] or self._num_running[tenant]:
            return True
        users = self._users.get(tenant)
        if users is None or not self._is_asked:
            return False
        return any(Account(tenant, user) in self._unanswered for user in users.standings)

    def _tell_fell(self, tenant: str, user: str = "") -> None:
        self._tenants.waiting.fell(tenant)
        if (group := self._users.get(tenant)) is not None:
            group.waiting.fell(user)
        for fell in self._fell:
            fell(Account(tenant, user))
