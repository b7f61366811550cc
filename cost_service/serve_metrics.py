"""Metrics that several deployments share."""

from ray.util.metrics import Gauge


def degraded_gauge() -> Gauge:
    """1 while a part is not itself, by its name in the tag `part`."""
    return Gauge(
        "adaptivellm_degraded",
        description="1 while a part is not itself: preemption does as vLLM does, cost_service or fairness does not answer a "
        "replica, state of either is not stored, output_lengths are not exchanged by an ingress, tenants are not read anew, "
        "weights are not told by an ingress, routing_stats are late, autoscaling does not hear of all replicas.",
        tag_keys=("part",),
    )
