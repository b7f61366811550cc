"""What replicas and the fairness scheduler tell each other: cumulative totals one way, absolute counters the other.

Plain values that any encoding carries; neither side imports the other. Those that hold numbers alone are kept by the
thousands and can be in no cycle: the garbage collector leaves them out. Between processes travel `FairnessReport` and
`FairnessAnswer`, as MessagePack.
"""

import heapq
import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from cost_service.charges import MAX_COUNT, Account, Served, ServiceKind

ACTOR = "fairness"
"""Name of the actor around the fairness scheduler."""

ENGINE_INTERVAL_S = 0.1
"""Seconds between two reports of an engine that works; it also reports when it falls idle."""

MAX_NAME = 512
"""Characters of a pool's, replica's or epoch's name."""

STAMP_TENANT = "adaptivellm_tenant"
"""Under which a request's stamp (`vllm_xargs`) names its tenant, to engines and routers."""

ROUTING_STATS = "adaptivellm"
"""Under which a replica's routing statistics hold its `ReplicaLoad`."""

AUTOSCALING_STATS = "adaptivellm_"
"""Before the names of the numbers that a replica tells Serve's autoscaler (`AutoscalingStats`)."""

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


class AutoscalingStats(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a replica tells the autoscaler: numbers alone, for Serve keeps a series of each."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    """KV blocks of the engine; 0 before its first step."""

    num_free_blocks: int = 0
    max_num_seqs: int = 0
    """Requests that run in one step at most; 0 before its first step."""

    queued_s: float = 0.0
    """Predicted seconds until those who wait have been served, if nobody else came."""

    preemptions: int = 0
    """Since the engine started."""

    age_s: float = 0.0
    """Seconds since the engine said so."""

    def to_numbers(self) -> dict[str, float]:
        """Return them by the names under which Serve keeps them."""
        return {AUTOSCALING_STATS + name: getattr(self, name) for name in self.__struct_fields__}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> "AutoscalingStats | None":
        """Read what `to_numbers` has written; None where a number is missing or is none that can be."""
        values: dict[str, float] = {}
        for name in cls.__struct_fields__:
            value = numbers.get(AUTOSCALING_STATS + name)
            if not isinstance(value, int | float) or not 0 <= value < MAX_COUNT:
                return None
            values[name] = value if name in ("queued_s", "age_s") else int(value)
        return cls(**values)  # type: ignore[arg-type]


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


class Version(NamedTuple):
    """What a replica has been told."""

    present: int = 0
    """Of tenants that are present at the replica."""

    absent: int = 0
    """Of all others, who are told of more seldom."""


UNTOLD = Version()
"""Of a replica that was told nothing."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica is told at an interval."""

    version: Version
    """To be named when it reports next."""

    shares: list[Share]


class ReplicaLimits(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one replica can hold and give."""

    num_pool_tokens: int
    """Tokens of its KV pool."""

    max_num_seqs: int
    max_tokens: int
    """Output tokens that a request may generate at most."""

    max_service_per_s: float
    """Most weighted service that it can give in a second: of its fastest steps."""

    max_decode_tokens_per_s: float
    """Most output tokens that it can generate in a second."""

    def checked(self, where: str) -> "ReplicaLimits":
        """Return them if they are possible.

        Raises:
            ValueError: A limit is out of range; the message names it.
        """
        for name in ("num_pool_tokens", "max_num_seqs", "max_tokens"):
            _check_count(name, getattr(self, name), where, least=1)
        for name in ("max_service_per_s", "max_decode_tokens_per_s"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} of {where} is {value!r}; it must be a number from 0 on.")
        return self


class FairnessReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a replica sends at an interval: a report of its engine, or none, and what it has of the scheduler."""

    pool: str
    """Replicas that serve the same requests: of one model of one application."""

    service: ServiceKind
    """What is equalised between tenants there."""

    replica: str
    epoch: str
    sequence: int
    """Of the engine's report; 0 without one."""

    accounts: list[tuple[Account, AccountReport]] = []
    """All that no answer has confirmed yet."""

    known: dict[str, float] | None = None
    """In a report of all accounts: counters by tenant, as the engine knows them."""

    limits: ReplicaLimits
    fair_victims: bool = False
    """Whether a full pool takes blocks from the tenant that was served most, and not from whoever came last."""

    bypass_service: float = 0.0
    """Service at weight 1 by which a tenant may be ahead and still pass a request that does not fit."""

    round_trip_s: float = 0.0
    """What the last exchange took."""

    life: str = ""
    """Of the scheduler whose answer it has; empty while it has none."""

    version: Version = UNTOLD
    """That it has of that life."""

    def checked(self) -> Report:
        """Return the engine's report if all numbers are possible.

        Raises:
            ValueError: A number is out of range; the message names it.
        """
        self.limits.checked(repr(self.replica))
        for name, number in (("round_trip_s", self.round_trip_s), ("bypass_service", self.bypass_service)):
            if not 0.0 <= number < math.inf:
                raise ValueError(f"{name} of {self.replica!r} is {number!r}; it must be a number from 0 on.")
        for name, value in (("pool", self.pool), ("replica", self.replica), ("epoch", self.epoch)):
            if not 0 < len(value) <= MAX_NAME:
                raise ValueError(f"{name} has {len(value)} characters; it must have from 1 to {MAX_NAME}.")
        for tenant, counter in (self.known or {}).items():
            if not 0.0 <= counter < MAX_COUNT:
                raise ValueError(
                    f"The counter of {tenant!r} at {self.replica!r} is {counter!r}; it must be from 0 up to 2^53."
                )
        report = Report(
            replica=self.replica, epoch=self.epoch, sequence=self.sequence, accounts=dict(self.accounts)
        )  # fmt: skip
        return report.checked()


class FairnessAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a replica is told at an interval."""

    life: str
    """Of the scheduler; versions of another life mean nothing."""

    version: Version
    shares: list[Share]
    answered: int
    """Sequence of the report that was taken; 0 for none."""

    wants_everything: bool = False
    """Whether the next report shall name all accounts and what the engine knows: the scheduler is new to it. `life` and
    `version` are to be kept only once it has been told."""

    interval_s: float
    """Seconds until the next exchange."""


def heaviest(tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the tenants with the most tokens, at most `MAX_BACKLOG_TENANTS`; the lower name first where they are equal."""
    if len(tokens) <= MAX_BACKLOG_TENANTS:
        return dict(tokens)
    return dict(heapq.nsmallest(MAX_BACKLOG_TENANTS, tokens.items(), key=lambda item: (-item[1], item[0])))


def _are_counts(values: tuple[int, ...]) -> bool:
    """Whether all are integers from 0 up to 2^53; for thousands of lines a second, names come later."""
    for value in values:  # noqa: SIM110 `all` takes twice as long
        if type(value) is not int or not 0 <= value < MAX_COUNT:
            return False
    return True


def _check_count(field_name: str, value: int, where: str, *, least: int = 0) -> None:
    if type(value) is not int or not least <= value < MAX_COUNT:
        raise ValueError(f"{field_name} of {where} is {value!r}; it must be an integer from {least} up to 2^53.")
