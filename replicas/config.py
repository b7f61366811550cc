"""Settings of one replica's memory decisions, as they travel in vLLM's `kv_connector_extra_config`.

Rule: frozen values with units in their names; a bad or unknown key is a `ValueError` that names it and the mend.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

from cost_service.charges import ServiceKind
from replicas.fair_queue import Admission


class PreemptionPolicy(StrEnum):
    """How our scheduler treats a request that must give way. `stock` is vLLM's own scheduler class and not in here."""

    RECOMPUTE = "recompute"
    """Drop the KV blocks and prefill again, as vLLM does."""

    SWAP = "swap"
    """Copy the KV blocks to host memory while the host pool has room, else recompute."""

    ADAPTIVE = "adaptive"
    """The pair of victim and action that costs least, chosen ahead of vLLM's own loop."""

    RANDOM = "random"
    """Either action, by a hash: for tests of exactness, offered to no user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapConfig:
    """What `SwapConnector` and the scheduler read from `kv_connector_extra_config`."""

    preemption: PreemptionPolicy = PreemptionPolicy.SWAP
    """Policy at start; the control channel can change it while the engine runs."""

    admission: Admission = Admission.FAIR
    """Who of those who wait is admitted next; the control channel can change it too. Requests without a stamp keep
    vLLM's order under either."""

    service: ServiceKind = ServiceKind.TOKENS
    """What is equalised between tenants."""

    predicts_output: bool = False
    """Whether the predicted output of running requests counts in advance when tenants are ordered; what turns out too much
    is given back. Gaps between tenants are smaller if predictions are good."""

    host_pool_bytes: int = 1 << 30
    """Host memory for swapped-out KV blocks, per worker process (each tensor-parallel rank keeps its own shard)."""

    max_tenant_fraction: float = 1.0
    """Share of the host pool that one tenant's requests may hold."""

    cost_snapshot: str | None = None
    """JSON of a `cost_service.snapshot.CostSnapshot`; None: the analytic one of model and hardware."""

    verify_checksums: bool = False
    """Whether a block is loaded only if its bytes in host memory are still those that were saved; on CPU only."""

    guard: bool = True
    """Whether wrong predictions or a loss of throughput make adaptive preemption give way to vLLM's own; off to study it."""

    decision_log_folder: str | None = None
    """Where every choice is written with all that went into it, one file per engine; None: nowhere."""

    throttled_link_bytes_per_s: float | None = None
    """SIMULATED: transfers end as if over a link of this speed, to study slow links on CPU. None: no throttle."""

    throttled_link_latency_s: float = 0.0
    """SIMULATED: what every transfer takes on top."""

    throttled_link_shared_ratio: float = 0.0
    """SIMULATED: how much slower a transfer is beside one of the other direction; 1: one bandwidth for both."""

    def __post_init__(self) -> None:
        if isinstance(self.host_pool_bytes, bool) or not isinstance(self.host_pool_bytes, int):
            raise ValueError("host_pool_bytes must be a whole number of bytes.")
        if self.host_pool_bytes < 0:
            raise ValueError("host_pool_bytes must not be negative; 0 turns swapping off.")
        for name in ("guard", "verify_checksums", "predicts_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false.")
        if self.decision_log_folder is not None and not isinstance(self.decision_log_folder, str):
            raise ValueError("decision_log_folder must be a path; leave it out to write no log.")
        if not 0 < self.max_tenant_fraction <= 1:
            raise ValueError("max_tenant_fraction must be above 0 and at most 1.")
        if self.throttled_link_bytes_per_s is not None and not 0 < self.throttled_link_bytes_per_s < math.inf:
            raise ValueError("throttled_link_bytes_per_s must be above 0 and finite; leave it out for no throttle.")
        if not 0 <= self.throttled_link_latency_s < math.inf:
            raise ValueError("throttled_link_latency_s must be finite and not negative.")
        if not 0 <= self.throttled_link_shared_ratio <= 1:
            raise ValueError(
                "throttled_link_shared_ratio must be between 0 (full duplex) and 1 (one bandwidth for both)."
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Build from plain values (JSON or YAML).

        Raises:
            ValueError: An unknown key or policy, or a size that is not a whole number of bytes.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(mapping) - known)
        if unknown:
            raise ValueError(f"Unknown key {unknown[0]!r} in kv_connector_extra_config; known: {sorted(known)}.")
        values = dict(mapping)
        if "preemption" in values:
            values["preemption"] = parse_policy(values["preemption"])
        if "admission" in values:
            values["admission"] = parse_admission(values["admission"])
        if "service" in values:
            if values["service"] not in list(ServiceKind):
                raise ValueError(f"service must be one of {[kind.value for kind in ServiceKind]}.")
            values["service"] = ServiceKind(values["service"])
        return cls(**values)


def parse_policy(name: object) -> PreemptionPolicy:
    """Return the policy of that name.

    Raises:
        ValueError: Not one of the policies that a running engine can follow.
    """
    if name not in list(PreemptionPolicy):
        known = [policy.value for policy in PreemptionPolicy if policy is not PreemptionPolicy.RANDOM]
        raise ValueError(f"preemption must be one of {known}.")
    return PreemptionPolicy(str(name))


def parse_admission(name: object) -> Admission:
    """Return the order of admission of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in list(Admission):
        raise ValueError(f"admission must be one of {[admission.value for admission in Admission]}.")
    return Admission(str(name))
