"""One ingress's copy of the tenants, read anew beside requests.

Rules:
- The store may be away at any time: the last known tenants stay, keys and caps as they were.
- Tenants are never deleted. One that was there and is missing has a damaged document: it stays as it was, too.
- What was read is whole before it takes the place of what was known; a reader never sees a half.
"""

import logging
from collections.abc import Collection, Mapping

from cluster.tenant_registry import Store, Tenant, TenantRegistry

logger = logging.getLogger(__name__)

READ_ANEW = 30
"""Looks after which everything is read whatever the version says: a writer may have been killed before it said so."""


class TenantCopy:
    """The tenants as they were last seen."""

    def __init__(self, store: Store, bootstrap: Mapping[str, str]) -> None:
        """Know the keys of the installation's file alone, until the first `refresh`; arguments as of `TenantRegistry`."""
        self._registry = TenantRegistry(store, bootstrap)
        self._known: Mapping[str, Tenant] = {}
        self._missing: Collection[str] = ()
        self._version: str | None = None
        self._looks_to_go = 0
        self._is_away = False
        self.directory = self._registry.directory({})
        self.is_read = False
        """Whether the store was ever read: before that, a key that is not known may be a good one."""

    def refresh(self) -> bool:
        """Look for changes; returns whether all tenants are as the store has them. Blocks: not for an event loop."""
        try:
            version = self._registry.version()
            if version != self._version or self._looks_to_go == 0:
                self._read(version)
        except OSError as error:
            if not self._is_away:
                logger.warning("The store does not answer (%s): tenants stay as they are.", error)
            self._is_away = True
            return False
        self._looks_to_go -= 1
        self._is_away = False
        return not self._missing

    def _read(self, version: str | None) -> None:
        stored = self._registry.stored()
        self._missing = self._known.keys() - stored.keys()
        for name in sorted(self._missing):
            logger.warning("Tenant %s is no longer in the store: it stays as it was.", name)
        self._known = {**self._known, **stored}
        self.directory = self._registry.directory(self._known)
        self._version, self._looks_to_go, self.is_read = version, READ_ANEW, True
