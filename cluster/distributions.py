"""Distributions of a run's weighted turnarounds and times to first token, in a size that does not grow with its requests.

Rules: values at fixed shares of the requests, of all and of each tenant; a request without an end, or a first token, is in
none. Definitions are those of `cluster.bench_figures`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cluster.bench_figures import Calibration
from cluster.records import RequestRecord

MEASURES = ("weighted_turnaround", "ttft_s")
SHARES = (*(number / 100 for number in range(100)), 0.995, 0.999, 1.0)
"""Of all requests."""

TENANT_SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def distributions(records: Iterable[RequestRecord], calibration: Calibration) -> dict[str, Any]:
    """Values at `SHARES` by measure; under `tenants` those at `TENANT_SHARES` by tenant and measure. None of nothing."""
    own: dict[str, dict[str, list[float]]] = {}
    for record in records:
        of = own.setdefault(record.tenant, {name: [] for name in MEASURES})
        if record.finish_s is not None:
            of["weighted_turnaround"].append((record.finish_s - record.arrival_s) / calibration.alone_s(record))
        if record.first_token_s is not None:
            of["ttft_s"].append(record.first_token_s - record.arrival_s)
    everybody = {name: [value for of in own.values() for value in of[name]] for name in MEASURES}
    return _at(everybody, SHARES) | {"tenants": {tenant: _at(own[tenant], TENANT_SHARES) for tenant in sorted(own)}}


def _at(values: Mapping[str, Sequence[float]], shares: Sequence[float]) -> dict[str, list[float] | None]:
    return {name: np.quantile(of, shares).tolist() if of else None for name, of in values.items()}
