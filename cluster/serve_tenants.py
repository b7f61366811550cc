"""Who an ingress serves: its copy of the tenants, read anew beside requests, and what they have in work (shell).

Rule: no request waits for the store. A change of a tenant is in force after `INTERVAL_S` and what one look takes.
"""

import asyncio
from collections.abc import Mapping
from typing import NoReturn

from cluster.cache_salt import CacheSalts
from cluster.tenant_copy import TenantCopy
from cluster.tenant_limits import Admissions
from cluster.tenant_registry import Tenant
from cost_service.serve_metrics import degraded_gauge
from cost_service.store import Store

INTERVAL_S = 2.0


class LiveTenants:
    """One ingress's tenants."""

    def __init__(self, store: Store, bootstrap: Mapping[str, str], *, num_ingresses: int) -> None:
        """Read the store once, and be ready also if it is away; arguments as of `TenantRegistry` and `Admissions`."""
        self.admissions = Admissions(num_ingresses=num_ingresses)
        self._store, self._salts = store, CacheSalts()
        self._copy = TenantCopy(store, bootstrap)
        self._degraded = degraded_gauge("tenants")
        self._refresh()

    @property
    def may_know_all(self) -> bool:
        """Whether the store was ever read: before, nobody is known."""
        return self._copy.is_read

    def tenant_of(self, key: str) -> Tenant | None:
        """Return the tenant of a key, or None."""
        return self._copy.directory.tenant_of(key)

    def cache_salt(self, tenant: str) -> str:
        """Return what keeps a tenant's prefix cache apart from others'."""
        return self._salts.salt(tenant)

    def weights(self) -> Mapping[str, float]:
        """Return the weights of all tenants by name."""
        return {name: tenant.weight for name, tenant in self._copy.directory.tenants.items()}

    async def run(self) -> NoReturn:
        """Look for changes for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await asyncio.to_thread(self._refresh)

    def _refresh(self) -> None:
        is_well = self._copy.refresh()
        if is_well:
            try:
                self._salts.refresh(self._store)
            except OSError:  # the next look says so, if it lasts
                is_well = False
        self._degraded.set(float(not is_well), tags={"part": "tenants"})
