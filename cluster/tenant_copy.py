"""One ingress's copy of the tenants, read anew beside requests.

Rules:
- The store may be away at any time: the last known tenants stay, keys and caps as they were. Before it was read once,
  nobody is known: a key that the installation's file holds may have been revoked.
- Tenants are never deleted, and only grow newer. One that is missing, damaged or older than it is known here was lost in the
  store (it was emptied, or set back): it stays as it was, and is put back.
- What was read is whole before it takes the place of what was known; a reader never sees a half.
"""

import logging
from collections.abc import Mapping

from cluster.tenant_registry import Directory, Tenant, TenantRegistry
from cost_service.store import Store

logger = logging.getLogger(__name__)

MAX_READ_ANEW, TENANTS_PER_LOOK = 30, 500
"""Looks after which everything is read whatever the version says, the fewer the fewer tenants there are, and at most: a
writer may have been killed before it said so, and documents may be damaged."""


class TenantCopy:
    """The tenants as they were last seen."""

    def __init__(self, store: Store, bootstrap: Mapping[str, str]) -> None:
        """Know nobody until the first `refresh`; arguments as of `TenantRegistry`."""
        self._registry = TenantRegistry(store, bootstrap)
        self._known: Mapping[str, Tenant] = {}
        self._version: str | None = None
        self._looks_to_go = 0
        self._is_away = False
        self._lost: frozenset[str] = frozenset()
        self.directory = Directory({}, {})
        self.is_read = False
        """Whether the store was ever read: before that, no key is known to be a good one, or a bad one."""

    @property
    def read_anew(self) -> int:
        """Looks from one time that everything is read to the next."""
        return min(MAX_READ_ANEW, 1 + len(self._known) // TENANTS_PER_LOOK)

    def refresh(self) -> bool:
        """Look for changes; returns whether the store can be used. Blocks: not for an event loop."""
        try:
            version = self._registry.version()
            if version != self._version or self._looks_to_go <= 0:
                self._read(version)
        except OSError as error:
            if not self._is_away:
                logger.warning("The store cannot be used (%s): tenants stay as they are.", error)
            self._is_away, self._looks_to_go = True, 0  # it may come back empty
            return False
        if self._is_away:
            logger.warning("The store can be used again.")
        self._looks_to_go -= 1
        self._is_away = False
        return True

    def _read(self, version: str | None) -> None:
        stored = self._registry.stored()
        lost = [
            tenant
            for name, tenant in self._known.items()
            if name not in stored or stored[name].revision < tenant.revision
        ]
        self._known = {**stored, **{tenant.name: tenant for tenant in lost}}
        self.directory = self._registry.directory(self._known)
        self._version, self._looks_to_go, self.is_read = version, self.read_anew, True
        before, self._lost = self._lost, frozenset(tenant.name for tenant in lost)
        if self._lost - before:
            logger.warning(
                "%d tenants are no longer in the store as they were, %s the first: they stay, and are put back.",
                len(lost), min(self._lost),
            )  # fmt: skip
        if lost:
            self._registry.put_back(lost)
