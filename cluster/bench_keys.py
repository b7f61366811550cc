"""API keys of a workload's tenants, for benchmarks of a running cluster: given by its user, or made for the run.

Rules:
- A key is in memory and in the headers of requests: never in what is printed, written or raised.
- Tenants that are made are named `bench-0`, `bench-1`, ... and are there to be used again, for a tenant's name is never free
  again; their keys are revoked at the end, whatever happens. One that has a live key is somebody's, and is left alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster import keys
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import TenantRegistry

IN_FORCE_S = 5.0
"""Within which every ingress knows a key that was made."""


def read_keys(path: Path, tenants: Sequence[str]) -> dict[str, str]:
    """Read every tenant's key from a file: a JSON object, or lines of `NAME KEY`.

    Raises:
        ValueError: Others may read the file, it holds something else, or a tenant has no key there.
        OSError: It cannot be read.
    """
    keys.refuse_if_open_to_others(path)
    text = path.read_text()
    try:
        found = (
            json.loads(text)
            if text.lstrip().startswith("{")
            else dict(line.split() for line in text.splitlines() if line.strip())
        )
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(key, str) and is_key(key) for key in found.values()):
        raise ValueError(f"--keys {path.name} must be a JSON object of keys by tenant, or lines of NAME KEY.")
    if missing := [tenant for tenant in tenants if tenant not in found]:
        raise ValueError(f"--keys {path.name} has no key of tenant {missing[0]}: add it, or use --make-tenants.")
    return {tenant: found[tenant] for tenant in tenants}


def is_key(text: str) -> bool:
    """Whether it can be sent in a header."""
    return re.fullmatch(r"[\x21-\x7e]{1,1000}", text) is not None


@contextmanager
def made_tenants(
    registry: TenantRegistry, tenants: Sequence[str], weights: Mapping[str, float]
) -> Iterator[dict[str, str]]:
    """Make a tenant for each of a workload's, with its weight; yields a key by the workload's name of the tenant.

    Raises:
        ValueError: A tenant of such a name has a live key, or a weight is not allowed.
        OSError: The store cannot be used.
    """
    known = registry.directory().tenants
    made: dict[str, str] = {}
    with ExitStack() as stack:
        for number, tenant in enumerate(tenants):
            name, weight = f"bench-{number}", weights.get(tenant, 1.0)
            if name not in known:
                key = registry.add(name, weight=weight, limits=TenantLimits())
            elif known[name].live_keys:
                raise ValueError(
                    f"Tenant {name} has a key in use: revoke it by `python -m cluster tenants revoke {name}`."
                )
            else:
                key = registry.add_key(name)
            stack.callback(registry.revoke, name, keys.key_id(keys.hash_key(key)))
            registry.set_weight(name, weight)
            made[tenant] = key
        yield made
