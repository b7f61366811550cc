"""A simulated cluster put together: replicas, router, fairness scheduler, and the watch that judges them.

Rules:
- Replicas with fair admission exchange with one scheduler if there are several; those of `local` hear of nobody.
- A watched run takes every step by itself, so that the watch sees them in the order of time.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.bench_command import named_as_options
from cluster.disturbances import Disturbances
from cluster.fairness_watch import FairnessWatch, bound_of
from cluster.records import RequestRecord
from cluster.routing import Router
from cluster.simulated_autoscaling import Autoscaling, SimulatedAutoscaler, parse_autoscaling
from cluster.simulated_replica import LOCAL, ReplicaBuilder, ReplicaKind
from cluster.simulated_share import ShareSettings, SimulatedShare
from cluster.simulation import Simulation
from cluster.tenant_routing import Places, TenantRouter, parse_pin
from cost_service.charges import SYSTEM
from cost_service.output_length import OutputLength
from cost_service.traces import TraceRequest
from global_scheduler.bound import FairnessBound
from global_scheduler.fair_share import absent_s
from global_scheduler.fairness_service import interval_s
from global_scheduler.max_min import max_min_levels
from replicas.admission import AdmissionSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCluster:
    """All of a cluster but what its replicas are."""

    num_replicas: int
    router: Callable[[], Router]
    pins: Mapping[str, Places] = field(default_factory=dict)
    """Tenants that use some replicas alone, or some more than others."""

    num_users: Mapping[str, int] = field(default_factory=dict)
    """Of tenants whose requests come from several users in turns."""

    share: ShareSettings = field(default_factory=ShareSettings)
    disturbances: Disturbances = field(default_factory=Disturbances)
    autoscaling: Autoscaling | None = None
    """None: there are `num_replicas`, or as many as is given in `disturbances`."""

    @property
    def most_replicas(self) -> int:
        """At any time."""
        most = self.autoscaling.settings.max_replicas if self.autoscaling is not None else 0
        return max(self.num_replicas, *(num for _, num in self.disturbances.scale), most)

    @property
    def interval_s(self) -> float:
        """Between two reports of a replica."""
        return self.share.interval_s or interval_s(self.most_replicas)

    def bound(self, kind: ReplicaKind, requests: Sequence[TraceRequest], *, away_s: float = 0.0) -> FairnessBound:
        """The stated bound of these requests on these replicas.

        Args:
            away_s: For how long the scheduler is away.
        """
        lengths = {(one.prompt_tokens, one.output_tokens) for one in requests}
        tenants = {SYSTEM, *(one.tenant for one in requests)}
        return bound_of(
            kind.settings, kind.times, num_replicas=self.most_replicas, lengths=lengths,
            interval_s=self.interval_s, round_trip_s=2.0 * self.disturbances.report_delay_s, away_s=away_s,
            absent_s=absent_s(len(tenants), self.interval_s),
            granted_service=AdmissionSettings().bypass_service,
        )  # fmt: skip

    def watch(
        self, kind: ReplicaKind, requests: Sequence[TraceRequest], *, shares_from_s: float = 0.0
    ) -> FairnessWatch:
        """A judge of a run; tenants that share no replicas' limits are not compared."""
        weights = {one.tenant: kind.weights.get(one.tenant, 1.0) for one in requests}
        bound = self.bound(kind, requests, away_s=self.share.away_s)
        return FairnessWatch(bound, weights=weights, groups=self._groups(weights), shares_from_s=shares_from_s)

    def simulation(
        self, kind: ReplicaKind, *, done: Callable[[RequestRecord], None], watch: FairnessWatch | None = None,
        credit: float | None = None, lengths: OutputLength | None = None, check: bool = False,
        scaler: SimulatedAutoscaler | None = None,
    ) -> Simulation:  # fmt: skip
        """A run to begin.

        Args:
            scaler: Of `autoscaling`, where that is wished for.
            credit: How far a tenant may fall behind elsewhere; see `FairCounters`. None: replicas do not exchange.
        """
        if watch is not None:
            kind = replace(kind, settings=replace(kind.settings, strides=False))
        exchange = None
        if credit is not None and kind.is_fair and kind.admission != LOCAL and self.most_replicas > 1:
            exchange = SimulatedShare(self.share, weights=kind.weights, credit=credit)
        router = self.router()
        return Simulation(
            ReplicaBuilder(kind), num_replicas=self.num_replicas,
            router=TenantRouter(router, self.pins) if self.pins else router, done=done,
            disturbances=self.disturbances, exchange=exchange, report_interval_s=self.interval_s,
            lengths=lengths, watch=watch, num_users=self.num_users, scaler=scaler, check=check,
        )  # fmt: skip

    def _groups(self, weights: Mapping[str, float]) -> dict[str, str]:
        names = [str(number) for number in range(self.num_replicas)]
        reach = {tenant: frozenset(map(str, self.pins.get(tenant, names))) for tenant in weights}
        if not any(reach[tenant] < frozenset(names) for tenant in weights):
            return {}
        levels = max_min_levels(weights, reach, dict.fromkeys(names, 1.0))
        return {tenant: f"level {number}" for number, level in enumerate(levels) for tenant in level.tenants}


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how replicas are reached and how they exchange."""
    add = parser.add_argument
    add(
        "--sync-interval-s", type=float,
        help="fair: between two reports of a replica (default: what the fairness actor asks of so many: 0.1 up to 100)",
    )  # fmt: skip
    add("--report-delay-s", type=float, default=0.0, help="fair: a report's and an answer's mean delay (default: 0)")
    add("--report-loss", type=float, default=0.0, help="fair: share of reports and answers that are lost (default: 0)")
    add(
        "--fairness-away", metavar="FROM:TO",
        help="fair: the scheduler is killed and restored from what it has stored, at these seconds",
    )  # fmt: skip
    add("--scale", metavar="S:N,...", help="from second S on there are to be N replicas; others drain")
    add(
        "--autoscale", metavar="MIN:MAX,...",
        help="as many replicas as the load asks for, instead of --replicas; with further settings, such as"
        " 2:8,target_queued_s=5 (fair admission only)",
    )  # fmt: skip
    add("--startup-s", type=float, default=60.0, help="--autoscale: until a new replica takes requests (default: 60)")
    add(
        "--pin", action="append", default=[], metavar="TENANT=R:PART,...",
        help="a tenant's replicas, with its part on each (default: 1); may be repeated",
    )  # fmt: skip
    add(
        "--users", action="append", default=[], metavar="TENANT=N",
        help="a tenant's requests come from N users in turns; may be repeated",
    )  # fmt: skip
    add(
        "--watch-fairness",
        action="store_true",
        help="check the bound at every event; on where admission is not first-come",
    )


@named_as_options(
    "crash_interval_s", "restart_s", "report_delay_s", "report_loss", "scale", interval_s="--sync-interval-s"
)
def cluster_of(options: argparse.Namespace, router: Callable[[], Router]) -> SimulatedCluster:
    """The cluster that the options describe, those of `cluster.simulate` among them.

    Raises:
        ValueError: An option is wrong.
    """
    away, autoscaling = options.fairness_away, None
    if options.autoscale is not None:
        autoscaling = parse_autoscaling(options.autoscale, startup_s=options.startup_s)
        if options.scale is not None:
            raise ValueError("--scale and --autoscale cannot both say how many replicas there are: leave one out.")
    pins = dict(parse_pin(text) for text in options.pin)
    return SimulatedCluster(
        num_replicas=options.replicas if autoscaling is None else autoscaling.settings.min_replicas,
        router=router, pins=pins, autoscaling=autoscaling,
        num_users=dict(_users(text) for text in options.users),
        share=ShareSettings(
            interval_s=options.sync_interval_s, away=None if away is None else _pair("--fairness-away", away)
        ),
        disturbances=Disturbances(
            seed=options.seed, crash_interval_s=options.crash_interval_s, restart_s=options.restart_s,
            resubmit=not options.lose, report_delay_s=options.report_delay_s, report_loss=options.report_loss,
            scale=[
                (at_s, int(num)) for at_s, num in (_pair("--scale", each) for each in _parts(options.scale))
            ],
        ),
    )  # fmt: skip


def _parts(text: str | None) -> list[str]:
    return text.split(",") if text else []


def _pair(name: str, text: str) -> tuple[float, float]:
    first, _, second = text.partition(":")
    try:
        return float(first), float(second)
    except ValueError:
        raise ValueError(
            f"{name} must be two numbers with a colon between them, such as 60:62: it is {text!r}."
        ) from None


def _users(text: str) -> tuple[str, int]:
    tenant, _, num = text.rpartition("=")
    if not tenant or not num.isdecimal() or not 1 <= int(num) < 1_000_000:
        raise ValueError(f"--users must be TENANT=N, such as a=20: it is {text!r}.")
    return tenant, int(num)
