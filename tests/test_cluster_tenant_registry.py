"""Goal: what is said of tenants holds: keys let in until they are revoked, names are nobody else's, changes never get lost.

Method: a registry over a real store; a state machine of changes against sets kept beside it; damage by hand.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.keys import hash_key, key_id, new_key
from cluster.state import SqliteStore
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import Directory, TenantRegistry

NO_LIMITS = TenantLimits()
FIRST = "sk-adaptive-the-first"


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "state.sqlite")


@pytest.fixture
def registry(store: SqliteStore) -> TenantRegistry:
    return TenantRegistry(store, {hash_key(FIRST): "default"})


def name_of(registry: TenantRegistry, key: str) -> str | None:
    tenant = registry.directory().tenant_of(key)
    return None if tenant is None else tenant.name


class Changes(RuleBasedStateMachine):
    """Whatever is done in whatever order: live keys let in, others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        store = SqliteStore(Path(self.folder.name) / "state.sqlite")
        self.registry = TenantRegistry(store, {hash_key(FIRST): "default"})
        self.live = {FIRST: "default"}
        self.dead: dict[str, str] = {}
        self.weights = {"default": 1.0}

    def teardown(self) -> None:
        self.folder.cleanup()

    names = st.sampled_from(["default", "a", "b"])

    @rule(name=names, weight=st.sampled_from([0.5, 1.0, 3.0]))
    def add(self, name: str, weight: float) -> None:
        if name in self.weights:
            with pytest.raises(ValueError, match="already"):
                self.registry.add(name, weight=weight, limits=NO_LIMITS)
        else:
            self.live[self.registry.add(name, weight=weight, limits=NO_LIMITS)] = name
            self.weights[name] = weight

    @rule(name=names)
    def add_key(self, name: str) -> None:
        if name in self.weights:
            self.live[self.registry.add_key(name)] = name
        else:
            with pytest.raises(ValueError, match=f"There is no tenant {name}: "):
                self.registry.add_key(name)

    @rule(name=names, weight=st.sampled_from([0.25, 2.0]))
    def set_weight(self, name: str, weight: float) -> None:
        if name in self.weights:
            self.registry.set_weight(name, weight)
            self.weights[name] = weight

    @rule(data=st.data())
    def revoke_one(self, data: st.DataObject) -> None:
        if self.live:
            key = data.draw(st.sampled_from(sorted(self.live)))
            self.registry.revoke(self.live[key], key_id(hash_key(key)))
            self.dead[key] = self.live.pop(key)

    @rule(name=names)
    def revoke_all(self, name: str) -> None:
        if name in self.weights:
            assert self.registry.revoke(name).live_keys == ()
            gone = [key for key, owner in self.live.items() if owner == name]
            self.dead |= {key: self.live.pop(key) for key in gone}

    @invariant()
    def live_keys_let_in_and_others_do_not(self) -> None:
        directory = self.registry.directory()
        for key, name in self.live.items():
            tenant = directory.tenant_of(key)
            assert tenant is not None
            assert (tenant.name, tenant.weight) == (name, self.weights[name])
        assert all(directory.tenant_of(key) is None for key in self.dead)
        assert set(directory.tenants) == set(self.weights)


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=8, stateful_step_count=15, deadline=None)


# Keys


def test_a_key_is_stored_as_its_hash_alone(registry: TenantRegistry, store: SqliteStore) -> None:
    keys = [registry.add("a", weight=1.0, limits=NO_LIMITS), registry.add_key("a")]
    stored = str(store.load("tenants"))
    for key in keys:
        assert key.startswith("sk-adaptive-")
        assert key not in stored
        assert hash_key(key) in stored


def test_the_bootstrap_key_is_a_tenant_of_its_own_that_can_be_changed_and_revoked(registry: TenantRegistry) -> None:
    assert name_of(registry, FIRST) == "default"
    registry.set_weight("default", 2.0)
    tenant = registry.directory().tenant_of(FIRST)
    assert tenant is not None
    assert tenant.weight == 2.0
    registry.revoke("default")
    assert name_of(registry, FIRST) is None


def test_a_bootstrap_key_that_the_file_no_longer_has_lets_nobody_in(store: SqliteStore) -> None:
    TenantRegistry(store, {hash_key(FIRST): "default"}).set_weight("default", 2.0)
    renewed = TenantRegistry(store, {hash_key("sk-another"): "default"})
    assert name_of(renewed, FIRST) is None
    assert name_of(renewed, "sk-another") == "default"
    assert renewed.directory().tenants["default"].weight == 2.0


def test_a_revoked_bootstrap_key_stays_revoked_under_every_file(store: SqliteStore) -> None:
    TenantRegistry(store, {hash_key(FIRST): "default"}).revoke("default")
    for bootstrap in ({hash_key(FIRST): "default"}, {hash_key(FIRST): "other"}):
        assert name_of(TenantRegistry(store, bootstrap), FIRST) is None


def test_a_tenant_whose_keys_are_all_revoked_keeps_its_name(registry: TenantRegistry) -> None:
    registry.add("a", weight=1.0, limits=NO_LIMITS)
    registry.revoke("a")
    with pytest.raises(ValueError, match="There is a tenant a already"):
        registry.add("a", weight=1.0, limits=NO_LIMITS)
    assert name_of(registry, registry.add_key("a")) == "a"


def test_revoking_twice_keeps_the_first_time(registry: TenantRegistry, store: SqliteStore) -> None:
    registry.add("a", weight=1.0, limits=NO_LIMITS)
    document = store.load("tenants")["a"]
    document["keys"][0]["revoked"] = "2020-01-01T00:00:00+00:00"
    store.save("tenants", "a", document)
    assert registry.revoke("a").keys[0].revoked == "2020-01-01T00:00:00+00:00"


@pytest.mark.parametrize("key", ["00000000", "", "x"])
def test_a_key_that_the_tenant_does_not_have_cannot_be_revoked(registry: TenantRegistry, key: str) -> None:
    registry.add("a", weight=1.0, limits=NO_LIMITS)
    with pytest.raises(ValueError, match=f"Tenant a has no key {key}: "):
        registry.revoke("a", key)


# Names, weights, caps


@pytest.mark.parametrize("name", ["", " a", "a b", "a\n", "ä", "system", "x" * 65, "-a", "a/b", "a\0"])
def test_a_name_that_is_none_is_refused(registry: TenantRegistry, name: str) -> None:
    with pytest.raises(ValueError, match=r"^The tenant's name must be "):
        registry.add(name, weight=1.0, limits=NO_LIMITS)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e9])
def test_a_weight_of_zero_or_below_or_out_of_range_is_refused_and_changes_nothing(
    registry: TenantRegistry, weight: float
) -> None:
    with pytest.raises(ValueError, match=r"^The weight is .*; it must be from 0\.001 to 1000000\.$"):
        registry.add("a", weight=weight, limits=NO_LIMITS)
    registry.add("a", weight=3.0, limits=NO_LIMITS)
    with pytest.raises(ValueError, match=r"^The weight is .*; it must be from 0\.001 to 1000000\.$"):
        registry.set_weight("a", weight)
    assert registry.directory().tenants["a"].weight == 3.0


def test_caps_change_one_by_one(registry: TenantRegistry) -> None:
    registry.add("a", weight=1.0, limits=TenantLimits(max_queued_requests=5))
    registry.set_limits("a", {"max_concurrent_requests": 2})
    registry.set_limits("a", {"max_queued_tokens": 100})
    registry.set_limits("a", {"max_queued_requests": None})
    expected = TenantLimits(max_concurrent_requests=2, max_queued_tokens=100)
    assert registry.directory().tenants["a"].limits == expected
    with pytest.raises(ValueError, match="max_queued_tokens must be"):
        registry.set_limits("a", {"max_queued_tokens": 0})
    assert registry.directory().tenants["a"].limits == expected


# Copies and damage


def test_every_change_is_a_new_version_and_a_refused_one_is_none(registry: TenantRegistry) -> None:
    seen = [registry.version()]
    for change in (
        lambda: registry.add("a", weight=1.0, limits=NO_LIMITS),
        lambda: registry.add_key("a"),
        lambda: registry.set_weight("a", 2.0),
        lambda: registry.set_limits("a", {"max_queued_requests": 1}),
        lambda: registry.revoke("a"),
    ):
        change()
        seen.append(registry.version())
    assert len(set(seen)) == len(seen)
    with pytest.raises(ValueError, match="already"):
        registry.add("a", weight=1.0, limits=NO_LIMITS)
    assert registry.version() == seen[-1]


@pytest.mark.parametrize(
    "document",
    [
        None, [], 1, {"weight": "1"}, {"weight": 0}, {"weight": True}, {"weight": 10**400},
        {"keys": [{"sha256": "x", "since": ""}]},
        {"keys": [{"sha256": "0" * 64}]}, {"limits": {"max_queued_tokens": -1}}, {"limits": []},
    ],
)  # fmt: skip
def test_a_document_that_says_nonsense_lets_nobody_in_and_harms_no_other(
    registry: TenantRegistry, store: SqliteStore, document: Any, caplog: pytest.LogCaptureFixture
) -> None:
    key = registry.add("good", weight=1.0, limits=NO_LIMITS)
    store.save("tenants", "bad", document)
    assert set(registry.directory().tenants) == {"good", "default"}
    assert name_of(registry, key) == "good"
    assert "The document of tenant bad cannot be read" in caplog.text
    with pytest.raises(ValueError, match=r"tenant bad"):
        registry.add_key("bad")


def test_ten_thousand_tenants_are_looked_up_by_id() -> None:
    keys = [new_key() for _ in range(2)]
    bootstrap = {f"{number:064x}": f"t{number}" for number in range(10_000)} | {hash_key(keys[0]): "me"}
    directory = Directory({}, bootstrap)
    found = directory.tenant_of(keys[0])
    assert found is not None
    assert found.name == "me"
    assert directory.tenant_of(keys[1]) is None
