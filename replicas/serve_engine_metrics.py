"""What an engine reports, as metrics of its replica (shell around Ray's metrics).

Rule: counters follow the totals of one life of the engine; another life begins at zero and adds to what was counted.
"""

import time

from cost_service.metrics import (
    ACTIONS,
    COST_ERROR,
    COSTS_VERSION,
    DROPPED_REPORTS,
    ENGINE_STEPS,
    GUARDED_STEPS,
    HEADROOM_BLOCKS,
    HOST_POOL_BLOCKS,
    KV_BLOCKS,
    METRICS,
    OUTPUT_TOKENS,
    POLICY,
    PREEMPTION_COST,
    PREEMPTIONS,
    REPORT_AGE,
    REQUESTS,
    SCHEDULED_TOKENS,
    SWAPPED_BLOCKS,
    WAITING_PROMPT_TOKENS,
    WEIGHTED_TURNAROUND,
)
from cost_service.serve_metrics import LiveCounter, LiveGauge, degraded_gauge
from cost_service.tenant_labels import OTHERS, TenantLabels
from replicas.messages import EngineTotals, ServiceReport
from replicas.turnaround import Ended, TurnaroundMeans

COUNTED = (
    (OUTPUT_TOKENS, "output_tokens", {}),
    (SCHEDULED_TOKENS, "scheduled_tokens", {}),
    (ENGINE_STEPS, "steps", {}),
    (GUARDED_STEPS, "guarded_steps", {}),
    (DROPPED_REPORTS, "dropped_messages", {}),
    (PREEMPTIONS, "swaps", {"action": "swap"}),
    (PREEMPTIONS, "recomputes", {"action": "recompute"}),
    (SWAPPED_BLOCKS, "swapped_out_blocks", {"direction": "out"}),
    (SWAPPED_BLOCKS, "swapped_in_blocks", {"direction": "in"}),
    *(
        (PREEMPTION_COST, f"{kind}_{action}_s", {"action": action, "kind": kind})
        for kind in ("predicted", "measured")
        for action in ACTIONS
    ),
)
"""Counter, field of `EngineTotals`, labels."""

TURNAROUND_KEEP_S = 300.0
"""A tenant none of whose requests has ended for so long is shown no more."""


class EngineMetrics:
    """Metrics of one replica."""

    def __init__(self, replica: str) -> None:
        names = {metric.name for metric, _, _ in COUNTED}
        self._counters = {name: LiveCounter(METRICS[name], replica=replica) for name in names}
        self._error = LiveGauge(COST_ERROR, replica=replica)
        self._turnaround = LiveGauge(WEIGHTED_TURNAROUND, keep_s=TURNAROUND_KEEP_S, replica=replica)
        self._means, self._labels = TurnaroundMeans(), TenantLabels()
        self._degraded = degraded_gauge("preemption", "cost_service", "fairness")
        self._headroom, self._costs_version = (
            LiveGauge(metric, replica=replica) for metric in (HEADROOM_BLOCKS, COSTS_VERSION)
        )
        self._host_blocks, self._kv_blocks, self._requests = (
            LiveGauge(metric, replica=replica) for metric in (HOST_POOL_BLOCKS, KV_BLOCKS, REQUESTS)
        )
        self._waiting, self._policy = (LiveGauge(metric, replica=replica) for metric in (WAITING_PROMPT_TOKENS, POLICY))
        self._reported_s = time.monotonic()
        self._age = LiveGauge(REPORT_AGE, replica=replica)
        self._age.set(lambda: time.monotonic() - self._reported_s)

    def say_degraded(self, part: str, away: bool) -> None:
        """Show whether a part does not answer."""
        self._degraded.set(float(away), tags={"part": part})

    @property
    def turnarounds(self) -> dict[str, Ended]:
        """Mean weighted turnaround by tenant, over how many of its last requests."""
        return self._means.means

    def show_turnarounds(self, report: ServiceReport) -> None:
        """Show how long requests that have ended took."""
        for tenant, mean in self._means.read(report.epoch, report.ended).items():
            self._turnaround.set(mean, tags={"tenant": tenant})

    def update(self, before: EngineTotals | None, now: EngineTotals) -> None:
        """Show totals; `before` are the last ones that were shown."""
        if before is not None and before.epoch != now.epoch:
            before = None
        for metric, field, tags in COUNTED:
            amount = getattr(now, field) - (getattr(before, field) if before else 0)
            self._counters[metric.name].inc(amount, tags=tags)
        for action in ACTIONS:
            predicted_s, measured_s = getattr(now, f"predicted_{action}_s"), getattr(now, f"measured_{action}_s")
            if measured_s > 0:
                self._error.set(abs(predicted_s - measured_s) / measured_s, tags={"action": action})
        self.say_degraded("preemption", now.guarded)
        self._headroom.set(now.headroom_blocks)
        self._costs_version.set(now.costs_version)
        self._policy.set_alone(1.0, tags={"preemption": now.preemption, "admission": now.admission})
        used, retained = now.num_used_host_slots, now.num_retained_host_slots
        self._host_blocks.replace(
            "state", {"used": used, "retained": retained, "free": now.num_host_slots - used - retained}
        )
        free = now.num_free_kv_blocks
        self._kv_blocks.replace("state", {"used": now.num_kv_blocks - free, "free": free})
        self._requests.replace("state", {"running": now.num_running, "waiting": now.num_waiting})
        self._waiting.replace("tenant", self._waiting_tokens(now))
        self._reported_s = time.monotonic()

    def _waiting_tokens(self, now: EngineTotals) -> dict[str, float]:
        """Prompt tokens that wait by label; what is of tenants that are not named is the others'."""
        tokens = {OTHERS: float(now.num_waiting_tokens - sum(now.backlog.values()))}
        for tenant, waiting in sorted(now.backlog.items(), key=lambda one: -one[1]):
            label = self._labels.label(tenant)
            tokens[label] = tokens.get(label, 0.0) + waiting
        return tokens
