"""All metrics of the product in one list: names, labels, and what each says.

Rules:
- A name is a promise to dashboards and alerts. Ray's exporter puts `ray_` before each, and `_total` after counters that do
  not end so (`Metric.exported`).
- Every label has few values. Those that are written out here are there from the start, counters at zero. Tenants go through
  `cost_service.tenant_labels`; replicas are what Serve calls them, so that Ray's own metrics can be joined.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product

ACTIONS = ("swap", "recompute")

ANY: tuple[str, ...] = ()
"""Values of a label that are not known before."""


class MetricKind(StrEnum):
    """How Prometheus reads it."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    kind: MetricKind
    description: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values by label; `ANY` where they are not known before."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        is_total = self.kind is MetricKind.GAUGE or self.name.endswith("_total")
        return f"ray_{self.name}" + ("" if is_total else "_total")

    def known_labels(self, fixed: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Every combination of values that is known from the start; none where a label's are not.

        Args:
            fixed: Labels that have one value in this process.
        """
        values = {name: (fixed[name],) if name in fixed else of for name, of in self.labels.items()}
        for combination in product(*values.values()):
            yield dict(zip(values, combination, strict=True))


def _counter(name: str, description: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(name=f"adaptivellm_{name}", kind=MetricKind.COUNTER, description=description, labels=labels)


def _gauge(name: str, description: str, **labels: tuple[str, ...]) -> Metric:
    return Metric(name=f"adaptivellm_{name}", kind=MetricKind.GAUGE, description=description, labels=labels)


# Of everybody

DEGRADED = _gauge(
    "degraded",
    "1 while a part is not itself: preemption does as vLLM does, cost_service or fairness does not answer a replica, "
    "state of either is not stored, output_lengths are not exchanged by an ingress, tenants are not read anew, weights are "
    "not told by an ingress, routing_stats are late, autoscaling does not hear of all replicas.",
    part=ANY,
)

# Of a replica

PREEMPTIONS = _counter("preemptions_total", "Requests that gave way.", replica=ANY, action=ACTIONS)
PREEMPTION_COST = _counter(
    "preemption_cost_seconds", "Engine seconds that preemptions were predicted to cost, and did.",
    replica=ANY, action=ACTIONS, kind=("predicted", "measured"),
)  # fmt: skip
COST_ERROR = _gauge(
    "cost_model_error_ratio",
    "How far predicted and measured seconds of preemptions are apart, relative to the measured ones.",
    replica=ANY, action=ACTIONS,
)  # fmt: skip
HOST_POOL_BLOCKS = _gauge(
    "host_pool_blocks", "KV blocks of the host pool: of swapped-out requests, spare copies, and free.",
    replica=ANY, state=("used", "retained", "free"),
)  # fmt: skip
KV_BLOCKS = _gauge("kv_blocks", "KV blocks of the engine's own memory.", replica=ANY, state=("used", "free"))
HEADROOM_BLOCKS = _gauge("headroom_blocks", "KV blocks kept free at admission.", replica=ANY)
REQUESTS = _gauge(
    "requests", "Requests in the engine; those that were preempted wait.", replica=ANY, state=("running", "waiting")
)
WAITING_PROMPT_TOKENS = _gauge(
    "waiting_prompt_tokens", "Prompt tokens of the requests that wait, by tenant.", replica=ANY, tenant=ANY
)
OUTPUT_TOKENS = _counter("output_tokens_total", "Tokens delivered.", replica=ANY)
SCHEDULED_TOKENS = _counter("scheduled_tokens_total", "Tokens computed, recomputed ones included.", replica=ANY)
ENGINE_STEPS = _counter("engine_steps_total", "Steps of the engine.", replica=ANY)
GUARDED_STEPS = _counter(
    "guarded_steps_total", "Steps in which the guard kept the policy from deciding on preemption.", replica=ANY
)
SWAPPED_BLOCKS = _counter(
    "swapped_blocks_total", "KV blocks copied to host memory and back.", replica=ANY, direction=("out", "in")
)
COSTS_VERSION = _gauge("costs_version", "Version of the cost snapshot that the engine decides by.", replica=ANY)
POLICY = _gauge("policy", "1 for the policies in force.", replica=ANY, preemption=ANY, admission=ANY)
REPORT_AGE = _gauge(
    "report_age_seconds", "Since the engine last reported; an idle engine has nothing to report.", replica=ANY
)
DROPPED_REPORTS = _counter(
    "dropped_reports_total", "Reports that found no room on the channel; later ones carry their content.", replica=ANY
)
WEIGHTED_TURNAROUND = _gauge(
    "weighted_turnaround",
    "How many times longer a tenant's last requests took here than they would have alone, as predicted.",
    replica=ANY, tenant=ANY,
)  # fmt: skip

# Of an ingress

REFUSED_REQUESTS = _counter(
    "refused_requests_total", "Requests that were over a cap of their tenant.",
    cap=("max_concurrent_requests", "max_queued_requests", "max_queued_tokens"),
)  # fmt: skip
OUTPUT_LENGTH_COVERAGE = _gauge(
    "output_length_coverage",
    "Share of requests whose length lay between the predicted 0.1- and 0.9-quantile: 0.8 is right.",
)
OUTPUT_LENGTH_LOSS_RATIO = _gauge(
    "output_length_loss_ratio",
    "Pinball loss of predicted output lengths over that of the tenant's own running quantiles.",
)

# Of the fairness actor

TENANT_SERVICE = _counter(
    "tenant_service_total", "Service that tenants were given: weighted tokens, or seconds of engine time.",
    pool=ANY, tenant=ANY,
)  # fmt: skip
FAIRNESS_GAP = _gauge(
    "fairness_gap",
    "How far apart the normalised service of two tenants is at most that have waited all the time.",
    pool=ANY,
)
FAIRNESS_BOUND = _gauge("fairness_bound", "What that gap is promised not to exceed.", pool=ANY)
FAIRNESS_GAP_OF_BOUND = _gauge("fairness_gap_of_bound", "The gap as a share of the bound.", pool=ANY)
FAIRNESS_WORST_OF_BOUND = _gauge(
    "fairness_worst_of_bound",
    "The largest share of the bound that any tenant strayed by since the actor started.",
    pool=ANY,
)
FAIRNESS_REPLICAS = _gauge("fairness_replicas", "Replicas that the fairness actor hears of.", pool=ANY)
FAIRNESS_REFUSED_REPORTS = _counter("fairness_refused_reports_total", "Replicas' reports that could not be taken.")

# Of the cost actor

LEARNED_COST_ERROR = _gauge(
    "learned_cost_error_ratio",
    "Median relative error of a cost, its samples predicted before they were learned.",
    model=ANY, hardware=ANY, cost=ANY,
)  # fmt: skip
REJECTED_COST_BATCHES = _counter("rejected_cost_batches_total", "Batches of cost samples that could not be read.")

METRICS = {one.name: one for one in list(globals().values()) if isinstance(one, Metric)}
"""All of them by name."""
