"""Tenants as labels of metrics: few of them, for every label is a time series of its own.

Rule: who has a label keeps it; once all are given, further tenants share one. Whoever counts asks in the order of service,
so that those who are served most have their own.
"""

OTHERS = "other"
UNNAMED = "anonymous"
"""Label of the tenant of requests without a stamp."""


class TenantLabels:
    """Labels that have been given."""

    def __init__(self, max_labels: int = 100) -> None:
        self._max_labels = max_labels
        self._given: set[str] = set()

    def label(self, tenant: str) -> str:
        """Return the tenant's label, or the shared one."""
        name = tenant or UNNAMED
        if name in self._given:
            return name
        if len(self._given) >= self._max_labels:
            return OTHERS
        self._given.add(name)
        return name
