"""Goal: an ingress's copy follows the store, and goes on with what it knew when the store is away or damaged.

Method: a copy and a registry over one real store, which is taken away, damaged and brought back.
"""

import sqlite3
from pathlib import Path

import pytest

from cluster.cache_salt import cache_salt, load_or_create_secret
from cluster.keys import hash_key
from cluster.state import SqliteStore
from cluster.tenant_copy import READ_ANEW, TenantCopy
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import TenantRegistry

FIRST = "sk-adaptive-the-first"
BOOTSTRAP = {hash_key(FIRST): "default"}


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "state.sqlite")


@pytest.fixture
def registry(store: SqliteStore) -> TenantRegistry:
    return TenantRegistry(store, BOOTSTRAP)


@pytest.fixture
def copy(store: SqliteStore) -> TenantCopy:
    copy = TenantCopy(store, BOOTSTRAP)
    assert copy.refresh()
    return copy


def add(registry: TenantRegistry, name: str = "a") -> str:
    return registry.add(name, weight=1.0, limits=TenantLimits())


def take_away(store: SqliteStore) -> Path:
    """Put the store aside, and something that is no file into its place."""
    aside = store.path.with_suffix(".aside")
    store.path.rename(aside)
    store.path.mkdir()
    return aside


def test_every_change_is_seen_at_the_next_look(copy: TenantCopy, registry: TenantRegistry) -> None:
    key = add(registry)
    assert copy.directory.tenant_of(key) is None
    assert copy.refresh()
    tenant = copy.directory.tenant_of(key)
    assert tenant is not None
    assert tenant.weight == 1.0
    registry.set_weight("a", 4.0)
    registry.set_limits("a", {"max_queued_requests": 3})
    assert copy.refresh()
    tenant = copy.directory.tenant_of(key)
    assert tenant is not None
    assert (tenant.weight, tenant.limits.max_queued_requests) == (4.0, 3)
    registry.revoke("a")
    assert copy.refresh()
    assert copy.directory.tenant_of(key) is None


def test_nothing_is_read_while_nothing_changes(copy: TenantCopy, registry: TenantRegistry) -> None:
    add(registry)
    copy.refresh()
    directory = copy.directory
    for _ in range(READ_ANEW - 1):
        assert copy.refresh()
    assert copy.directory is directory


def test_a_change_whose_writer_died_before_it_told_is_seen_later(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore
) -> None:
    key = add(registry)
    copy.refresh()
    document = store.load("tenants")["a"]
    document["keys"][0]["revoked"] = "2026-01-01T00:00:00+00:00"
    store.save("tenants", "a", document)
    for _ in range(READ_ANEW + 1):
        copy.refresh()
    assert copy.directory.tenant_of(key) is None


def test_while_the_store_is_away_the_last_known_tenants_stay_and_it_is_said_once(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    key = add(registry)
    copy.refresh()
    aside = take_away(store)
    for _ in range(3):
        assert not copy.refresh()
    assert copy.directory.tenant_of(key) is not None
    assert caplog.text.count("tenants stay as they are") == 1
    store.path.rmdir()
    aside.rename(store.path)
    registry.revoke("a")
    assert copy.refresh()
    assert copy.directory.tenant_of(key) is None


def test_an_ingress_that_starts_without_the_store_knows_the_bootstrap_key_and_that_it_knows_no_other(
    registry: TenantRegistry, store: SqliteStore
) -> None:
    key = add(registry)
    aside = take_away(store)
    copy = TenantCopy(store, BOOTSTRAP)
    assert not copy.refresh()
    assert copy.directory.tenant_of(FIRST) is not None
    assert not copy.is_read
    store.path.rmdir()
    aside.rename(store.path)
    assert copy.refresh()
    assert copy.is_read
    assert copy.directory.tenant_of(key) is not None


def test_a_tenant_whose_document_is_damaged_stays_as_it_was_and_others_change(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, other = add(registry), add(registry, "b")
    copy.refresh()
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE documents SET json = json || ' ' WHERE name = 'a'")
    connection.close()
    registry.revoke("b")
    assert not copy.refresh()
    assert not copy.refresh(), "it is said as long as it lasts"
    assert copy.directory.tenant_of(damaged) is not None
    assert copy.directory.tenant_of(other) is None
    assert "Tenant a is no longer in the store" in caplog.text


# Salts


def test_salts_are_a_tenants_own_and_the_same_on_every_ingress_and_after_a_restart(store: SqliteStore) -> None:
    secrets = [load_or_create_secret(store), load_or_create_secret(SqliteStore(store.path))]
    assert secrets[0] == secrets[1]
    salts = {cache_salt(secrets[0], name) for name in ("a", "b", "", "default", "\ud800")}
    assert len(salts) == 5
    assert {len(salt) for salt in salts} == {64}


def test_salts_of_another_deployment_are_others(tmp_path: Path) -> None:
    secrets = [load_or_create_secret(SqliteStore(tmp_path / name)) for name in ("one", "two")]
    assert cache_salt(secrets[0], "a") != cache_salt(secrets[1], "a")


@pytest.mark.parametrize("document", [None, 1, "", "0" * 63, {"hex": "0" * 64}])
def test_a_secret_that_is_none_is_made_anew(store: SqliteStore, document: object) -> None:
    store.save("secrets", "cache_salt", document)
    assert load_or_create_secret(store) == load_or_create_secret(store)


def test_without_a_store_an_ingress_makes_a_secret_for_itself(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    take_away(store)
    assert load_or_create_secret(store) != load_or_create_secret(store)
    assert "shares no prefix cache" in caplog.text
