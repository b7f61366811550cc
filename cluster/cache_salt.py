"""The salt of each tenant's prefix cache: no tenant finds, or learns by timing, what another one's requests have cached.

vLLM hashes a request's `cache_salt` into its first KV block, and through the chain of hashes into all others (vLLM
`v1/core/kv_cache_utils.py`). Ours is HMAC-SHA256 of the tenant's name under a secret of the deployment, which lies in the
store: the same on every ingress and after a restart, and not to be guessed from the name.
"""

import hashlib
import hmac
import logging
import re
import secrets
from typing import Any

from cluster.tenant_registry import Store

logger = logging.getLogger(__name__)

COLLECTION, NAME = "secrets", "cache_salt"


def load_or_create_secret(store: Store) -> bytes:
    """Return the deployment's secret, made where there is none; while the store is away, one for this process alone."""
    try:
        document = store.update(
            COLLECTION, NAME, lambda before: before if _is_secret(before) else secrets.token_hex(32)
        )
    except OSError as error:
        logger.warning("The store does not answer (%s): this ingress shares no prefix cache with others.", error)
        document = secrets.token_hex(32)
    return bytes.fromhex(document)


def cache_salt(secret: bytes, tenant: str) -> str:
    """Return the salt of a tenant, 64 hexadecimal digits."""
    assert len(secret) == 32, f"a secret of {len(secret)} bytes"
    return hmac.new(secret, tenant.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _is_secret(document: Any) -> bool:
    return isinstance(document, str) and re.fullmatch("[0-9a-f]{64}", document) is not None
