"""The salt of each tenant's prefix cache: no tenant finds, or learns by timing, what another one's requests have cached.

vLLM hashes a request's `cache_salt` into its first KV block, and through the chain of hashes into all others (vLLM
`v1/core/kv_cache_utils.py`). Ours is HMAC-SHA256 of the tenant's name under a secret of the deployment, which lies in the
store: the same on every ingress and after a restart, and not to be guessed from the name.
"""

import hashlib
import hmac
import re
import secrets
from typing import Any

from cost_service.store import Store

COLLECTION, NAME = "secrets", "cache_salt"


class CacheSalts:
    """One ingress's copy of the deployment's secret."""

    def __init__(self) -> None:
        """Make a secret for this ingress alone, until the first `refresh`."""
        self._secret = secrets.token_bytes(32)

    def refresh(self, store: Store) -> None:
        """Take the deployment's secret; where the store holds none, it is from now on this ingress's.

        Raises:
            OSError: The store is away: the secret stays as it is.
        """
        document = store.load(COLLECTION).get(NAME)
        if not _is_secret(document):
            document = store.update(COLLECTION, NAME, lambda found: found if _is_secret(found) else self._secret.hex())
        self._secret = bytes.fromhex(document)

    def salt(self, tenant: str) -> str:
        """Return the salt of a tenant, 64 hexadecimal digits."""
        return hmac.new(self._secret, tenant.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _is_secret(document: Any) -> bool:
    return isinstance(document, str) and re.fullmatch("[0-9a-f]{64}", document) is not None
