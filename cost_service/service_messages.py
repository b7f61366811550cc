"""What replicas and the fairness scheduler tell each other: cumulative totals one way, absolute counters the other.

Plain values that any encoding carries; neither side imports the other. Those that hold numbers alone are kept by the
thousands and can be in no cycle: the garbage collector leaves them out.
"""

import heapq
from collections.abc import Mapping

import msgspec

from cost_service.charges import MAX_COUNT, Account, Served

STAMP_TENANT = "adaptivellm_tenant"
"""Under which a request's stamp (`vllm_xargs`) names its tenant, to engines and routers."""

ROUTING_STATS = "adaptivellm"
"""Under which a replica's routing statistics hold its `ReplicaLoad`."""

ROUTING_STATS_PERIOD_S = 0.5
"""Between two questions for them: with their own age and the controller's rounds, routers know what was a second ago."""

MAX_BACKLOG_TENANTS = 32
"""Tenants that a replica names to routers: those of whom most waits."""


class ReplicaLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica tells routers."""

    epoch: str
    """Names this life of the engine."""

    sequence: int
    """Rises with every one of the epoch."""

    age_s: float = 0.0
    """Seconds since the engine said so, when it was handed to Serve."""

    num_running: int
    num_waiting: int
    num_blocks: int
    """KV blocks of the engine."""

    num_free_blocks: int
    """Those of them that nobody holds; they may be cached."""

    block_size: int
    """Tokens of a block."""

    num_waiting_tokens: int
    """Of the prompts of those who wait."""

    backlog: dict[str, int] = {}
    """The same by tenant, of at most `MAX_BACKLOG_TENANTS`."""


class AccountReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One account at one replica."""

    served: Served
    """Since the epoch began."""

    num_waiting: int = 0
    num_running: int = 0
    reserved: float = 0.0
    """Service that running requests are predicted to get and have not had yet."""


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
        _check_count("sequence", self.sequence, self.replica)
        for account, report in self.accounts.items():
            where = f"{account.tenant!r}/{account.user!r} at {self.replica!r}"
            report.served.checked(where)
            _check_count("num_waiting", report.num_waiting, where)
            _check_count("num_running", report.num_running, where)
            if not 0.0 <= report.reserved < MAX_COUNT:
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


def heaviest(tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the tenants with the most tokens, at most `MAX_BACKLOG_TENANTS`; the lower name first where they are equal."""
    if len(tokens) <= MAX_BACKLOG_TENANTS:
        return dict(tokens)
    return dict(heapq.nsmallest(MAX_BACKLOG_TENANTS, tokens.items(), key=lambda item: (-item[1], item[0])))


def _check_count(field_name: str, value: int, where: str) -> None:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise ValueError(f"{field_name} of {where} is {value!r}; it must be an integer from 0 up to 2^53.")
