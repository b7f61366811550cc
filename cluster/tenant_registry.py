"""Tenants with their keys, weights and caps, as documents of the product's store.

Rules:
- A tenant's document is changed whole, by one at a time, and never deleted: nobody else gets its name, and one that is
  missing is damaged, or its store was emptied. Every change has a higher revision, so that a copy knows which is newer.
- A key is shown once and stored as its hash. A revoked one stays in the document, so that no other source of keys (the file
  with the bootstrap key) brings it back.
- Whoever has a copy of the tenants sees by one small document, `version`, that it is old: every change ends with a new one.
  It is a random name, no number: two who change something at the same time cannot choose the same.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from cluster.document import DamageLog
from cluster.keys import Keyring, hash_key, key_id, new_key
from cluster.tenant_limits import TenantLimits
from cost_service.charges import SYSTEM, checked_weight
from cost_service.store import Store

TENANTS, VERSION = "tenants", "tenants_version"
MAX_KEYS = 1000
"""Of one tenant, revoked ones included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One API key."""

    sha256: str
    since: str
    """When it was made, in ISO 8601."""

    revoked: str | None = None
    """When it was revoked."""

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256 must be 64 hexadecimal digits.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who is served, and how much of the cluster.

    Raises:
        ValueError: The weight is out of range.
    """

    name: str
    weight: float = 1.0
    """Share of the cluster, relative to other tenants' weights."""

    limits: TenantLimits = field(default_factory=TenantLimits)
    keys: tuple[Key, ...] = ()
    revision: int = 0
    """How often it was changed."""

    def __post_init__(self) -> None:
        checked_weight(self.weight)

    @property
    def live_keys(self) -> tuple[Key, ...]:
        return tuple(key for key in self.keys if key.revoked is None)


class Directory:
    """All tenants at one moment, and whose a key is; does not change."""

    def __init__(self, tenants: Mapping[str, Tenant], bootstrap: Mapping[str, str]) -> None:
        """Join the store's tenants with the keys of the installation's file.

        Args:
            bootstrap: Tenant by hash of key. Such a tenant exists without a document too; a revoked key does not count.
        """
        self.tenants = dict(tenants)
        known = {key.sha256 for tenant in tenants.values() for key in tenant.keys}
        added = {sha256: name for sha256, name in bootstrap.items() if sha256 not in known}
        for sha256, name in added.items():
            tenant = self.tenants.get(name, Tenant(name=name))
            self.tenants[name] = replace(tenant, keys=(*tenant.keys, Key(sha256=sha256, since="")))
        self._keyring = Keyring(
            {key.sha256: tenant.name for tenant in self.tenants.values() for key in tenant.live_keys}
        )

    def tenant_of(self, key: str) -> Tenant | None:
        """Return the tenant of a key, or None."""
        name = self._keyring.tenant_of(key)
        return None if name is None else self.tenants[name]


class TenantRegistry:
    """Reads and changes the tenants of a store."""

    def __init__(self, store: Store, bootstrap: Mapping[str, str]) -> None:
        """Nothing is read yet.

        Args:
            bootstrap: See `Directory`.
        """
        self._store, self._bootstrap = store, bootstrap
        self._damage = DamageLog("the store")

    def version(self) -> str | None:
        """Another one than before, if tenants may have changed; read it before the tenants themselves."""
        return self._store.load(VERSION).get("all")

    def stored(self) -> dict[str, Tenant]:
        """Tenants that have a document, by name, without those whose document is damaged or cannot be read."""
        tenants = {}
        for name, document in self._store.load(TENANTS).items():
            try:
                tenants[name] = _tenant(name, document)
            except ValueError as error:
                self._damage.damaged(f"{TENANTS}/{name}", str(error))
            else:
                self._damage.whole(f"{TENANTS}/{name}")
        return tenants

    def directory(self, known: Mapping[str, Tenant] | None = None) -> Directory:
        """All tenants.

        Args:
            known: Those of the store; None reads them.
        """
        return Directory(self.stored() if known is None else known, self._bootstrap)

    def add(self, name: str, *, weight: float, limits: TenantLimits) -> str:
        """Make a tenant with a first key; returns the key, which is stored nowhere.

        Raises:
            ValueError: The name or the weight is not allowed, or there is such a tenant.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name) or name == SYSTEM:
            raise ValueError(
                "The tenant's name must be 1 to 64 letters, digits, dots, dashes, underscores and at signs, "
                f"begin with a letter or digit, and not be {SYSTEM}."
            )
        if name in self._bootstrap.values():
            raise _exists(name)
        key = new_key()
        tenant = Tenant(name=name, weight=weight, limits=limits, keys=(_made(key),))

        def make(before: Any | None) -> Any:
            if before is not None:
                raise _exists(name)
            return _document(tenant)

        self._store.update(TENANTS, name, make)
        self._tell()
        return key

    def add_key(self, name: str) -> str:
        """Give a tenant one more key; returns it.

        Raises:
            ValueError: There is no such tenant, or it has as many as a tenant may.
        """
        key = new_key()
        tenant = self._change(name, lambda tenant: replace(tenant, keys=(*tenant.keys, _made(key))))
        assert tenant.keys[-1].sha256 == hash_key(key), "the new key is not stored"
        return key

    def set_weight(self, name: str, weight: float) -> Tenant:
        """Change a tenant's weight.

        Raises:
            ValueError: There is no such tenant, or the weight is not allowed.
        """
        return self._change(name, lambda tenant: replace(tenant, weight=weight))

    def set_limits(self, name: str, caps: Mapping[str, int | None]) -> Tenant:
        """Change some of a tenant's caps, by the names of `TenantLimits`.

        Raises:
            ValueError: There is no such tenant, or a cap is not allowed.
        """
        return self._change(name, lambda tenant: replace(tenant, limits=replace(tenant.limits, **caps)))

    def revoke(self, name: str, key: str | None = None) -> Tenant:
        """Revoke one key of a tenant, or all.

        Args:
            key: Its id, as `keys.key_id` makes it.

        Raises:
            ValueError: There is no such tenant, or it has no such key.
        """

        def change(tenant: Tenant) -> Tenant:
            if key is not None and all(key_id(each.sha256) != key for each in tenant.keys):
                raise ValueError(f"Tenant {name} has no key {key}: see `python -m cluster tenants list`.")
            now = _now()
            return replace(
                tenant,
                keys=tuple(
                    replace(each, revoked=now) if each.revoked is None and key in (None, key_id(each.sha256)) else each
                    for each in tenant.keys
                ),
            )

        return self._change(name, change)

    def put_back(self, tenants: Iterable[Tenant]) -> None:
        """Store tenants as a copy knows them, but for those whose document is as new, or newer."""
        for tenant in tenants:

            def apply(before: Any | None, tenant: Tenant = tenant) -> Any:
                try:
                    is_newer = before is None or _tenant(tenant.name, before).revision < tenant.revision
                except ValueError:
                    is_newer = True
                return _document(tenant) if is_newer else before

            self._store.update(TENANTS, tenant.name, apply)
        self._tell()

    def _change(self, name: str, change: Callable[[Tenant], Tenant]) -> Tenant:
        """Change a tenant that exists, be it by the bootstrap file alone."""

        def apply(before: Any | None) -> Any:
            stored = {} if before is None else {name: _tenant(name, before)}
            tenant = Directory(stored, self._bootstrap).tenants.get(name)
            if tenant is None:
                raise ValueError(f"There is no tenant {name}: see `python -m cluster tenants list`.")
            after = change(tenant)
            if len(after.keys) > MAX_KEYS:
                raise ValueError(f"Tenant {name} has had {MAX_KEYS} keys, and may have no more: make another tenant.")
            # The file's keys are its own to replace, as long as they are not revoked.
            own = (key for key in after.keys if key.revoked is not None or key.sha256 not in self._bootstrap)
            return _document(replace(after, keys=tuple(own), revision=tenant.revision + 1))

        tenant = _tenant(name, self._store.update(TENANTS, name, apply))
        self._tell()
        return tenant

    def _tell(self) -> None:
        self._store.save(VERSION, "all", uuid.uuid4().hex)


def _tenant(name: str, document: Any) -> Tenant:
    try:
        return msgspec.convert({**document, "name": name}, Tenant)
    except (TypeError, OverflowError, msgspec.ValidationError) as error:
        raise ValueError(f"The document of tenant {name} cannot be read ({error}): restore the store.") from None


def _document(tenant: Tenant) -> dict[str, Any]:
    document = asdict(tenant)
    del document["name"]
    return document


def _made(key: str) -> Key:
    return Key(sha256=hash_key(key), since=_now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _exists(name: str) -> ValueError:
    return ValueError(
        f"There is a tenant {name} already: `tenants add {name} --another-key` gives it one more key, "
        "`weight` and `limit` change it."
    )
