"""Goal: an ingress's copy follows the store, and goes on with what it knew when the store is away or damaged.

Method: a copy and a registry over one real store, which is taken away, damaged and brought back.
"""

import sqlite3
from pathlib import Path

import pytest

from cluster import tenant_copy
from cluster.cache_salt import CacheSalts
from cluster.keys import hash_key, key_id
from cluster.state import SqliteStore
from cluster.tenant_copy import TenantCopy
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import Tenant, TenantRegistry

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


def test_nothing_is_read_while_nothing_changes_and_everything_now_and_then(
    copy: TenantCopy, registry: TenantRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_copy, "TENANTS_PER_LOOK", 3)
    registry.put_back(Tenant(name=f"t{number}") for number in range(4))
    copy.refresh()
    assert copy.read_anew == 2
    directory = copy.directory
    assert copy.refresh()
    assert copy.directory is directory
    assert copy.refresh()
    assert copy.directory is not directory


def test_a_change_whose_writer_died_before_it_told_is_seen_later(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore
) -> None:
    key = add(registry)
    copy.refresh()
    document = store.load("tenants")["a"]
    document["keys"][0]["revoked"] = "2026-01-01T00:00:00+00:00"
    store.save("tenants", "a", document)
    for _ in range(copy.read_anew + 1):
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


def test_an_ingress_that_starts_without_the_store_knows_nobody_and_that_it_does_not(
    registry: TenantRegistry, store: SqliteStore
) -> None:
    """Also of the installation's own keys it cannot know whether they were revoked."""
    key = add(registry)
    aside = take_away(store)
    copy = TenantCopy(store, BOOTSTRAP)
    assert not copy.refresh()
    assert copy.directory.tenant_of(FIRST) is None
    assert not copy.is_read
    store.path.rmdir()
    aside.rename(store.path)
    assert copy.refresh()
    assert copy.is_read
    assert copy.directory.tenant_of(key) is not None
    assert copy.directory.tenant_of(FIRST) is not None


def test_a_tenant_whose_document_is_damaged_stays_as_it_was_and_is_put_back(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, other = add(registry), add(registry, "b")
    copy.refresh()
    before = registry.stored()["a"]
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE documents SET json = json || ' ' WHERE name = 'a'")
    connection.close()
    registry.revoke("b")
    assert copy.refresh()
    assert copy.directory.tenant_of(damaged) is not None
    assert copy.directory.tenant_of(other) is None
    assert "a the first: they stay, and are put back" in caplog.text
    assert registry.stored()["a"] == before


def test_an_emptied_store_is_filled_again_by_any_copy_and_no_key_comes_back(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore
) -> None:
    revoked, key = add(registry), registry.add_key("a")
    copy.refresh()
    late = TenantCopy(store, BOOTSTRAP)
    late.refresh()
    registry.revoke("a", key_id(hash_key(revoked)))
    copy.refresh()
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM documents")
    connection.close()
    assert late.refresh(), "it has not heard that a key was revoked"
    assert registry.stored()["a"].revision == 1
    for one in (copy, late):
        for _ in range(one.read_anew + 1):
            assert one.refresh()
        assert one.directory.tenant_of(revoked) is None
        assert one.directory.tenant_of(key) is not None
    assert registry.stored()["a"].revision == 2


def test_what_cannot_be_put_back_is_said_once_and_tried_again(
    copy: TenantCopy, registry: TenantRegistry, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    key = add(registry)
    copy.refresh()
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM documents")
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON documents BEGIN SELECT RAISE(FAIL, 'full'); END")
    for _ in range(3):
        assert not copy.refresh()
        assert copy.directory.tenant_of(key) is not None
    assert caplog.text.count("put back") == caplog.text.count("cannot be used") == 1
    with sqlite3.connect(store.path) as connection:
        connection.execute("DROP TRIGGER full")
    connection.close()
    assert copy.refresh()
    assert set(registry.stored()) == {"a"}


# Salts


def salts(store: SqliteStore) -> CacheSalts:
    read = CacheSalts()
    read.refresh(store)
    return read


def test_salts_are_a_tenants_own_and_the_same_on_every_ingress_and_after_a_restart(store: SqliteStore) -> None:
    one, other = salts(store), salts(SqliteStore(store.path))
    names = ("a", "b", "", "default", "\ud800")
    assert [one.salt(name) for name in names] == [other.salt(name) for name in names]
    assert len({one.salt(name) for name in names}) == 5
    assert {len(one.salt(name)) for name in names} == {64}


def test_salts_of_another_deployment_are_others(tmp_path: Path) -> None:
    one, other = (salts(SqliteStore(tmp_path / name)) for name in ("one", "two"))
    assert one.salt("a") != other.salt("a")


@pytest.mark.parametrize("document", [None, 1, "", "0" * 63, {"hex": "0" * 64}])
def test_a_secret_that_is_none_is_made_anew(store: SqliteStore, document: object) -> None:
    store.save("secrets", "cache_salt", document)
    assert salts(store).salt("a") == salts(store).salt("a")


def test_without_a_store_an_ingress_has_a_secret_of_its_own_until_it_reads_the_common_one(store: SqliteStore) -> None:
    common, alone = salts(store), CacheSalts()
    aside = take_away(store)
    with pytest.raises(OSError, match="cannot be read"):
        alone.refresh(store)
    assert len({alone.salt("a"), CacheSalts().salt("a"), common.salt("a")}) == 3
    store.path.rmdir()
    aside.rename(store.path)
    alone.refresh(store)
    assert alone.salt("a") == common.salt("a")


def test_a_secret_that_was_lost_in_the_store_is_put_back(store: SqliteStore) -> None:
    one = salts(store)
    before = one.salt("a")
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM documents")
    connection.close()
    one.refresh(store)
    assert one.salt("a") == salts(store).salt("a") == before
