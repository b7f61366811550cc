"""Goal: every tenant of a workload has a key for as long as a benchmark runs, and no key is told to anybody."""

import json
from pathlib import Path

import pytest

from cluster.bench_keys import made_tenants, read_keys
from cluster.state import SqliteStore
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import TenantRegistry


def file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", [json.dumps({"a": "k1", "b": "k2", "c": "k3"}), "a k1\n\nb\tk2\nc k3\n"])
def test_a_file_of_keys_is_json_or_lines(tmp_path: Path, text: str) -> None:
    assert read_keys(file(tmp_path, text), ["a", "b"]) == {"a": "k1", "b": "k2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a secret extra", "must be a JSON object of keys by tenant, or lines of NAME KEY"),
        ('{"a": "secret"', "must be a JSON object of keys by tenant, or lines of NAME KEY"),
        ('{"a": {"key": "secret"}}', "must be a JSON object of keys by tenant, or lines of NAME KEY"),
        ('{"a": "secret\\r\\nX-Header: 1"}', "must be a JSON object of keys by tenant, or lines of NAME KEY"),
        ("", "has no key of tenant a"),
        ("b secret", "has no key of tenant a"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_without_repeating_it(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_keys(file(tmp_path, text), ["a"])
    assert "secret" not in str(error.value)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can be read by others: run chmod 600"):
        read_keys(file(tmp_path, "a secret", 0o640), ["a"])


@pytest.fixture
def registry(tmp_path: Path) -> TenantRegistry:
    return TenantRegistry(SqliteStore(tmp_path / "state.sqlite"), {})


def test_made_tenants_have_the_workloads_weights_no_caps_and_keys_until_the_end(registry: TenantRegistry) -> None:
    with made_tenants(registry, ["x/y", "plain"], {"x/y": 3.0}) as made:
        directory = registry.directory()
        first, second = (directory.tenant_of(made[tenant]) for tenant in ("x/y", "plain"))
        assert first is not None
        assert second is not None
        assert (first.name, first.weight, first.limits) == ("bench-0", 3.0, TenantLimits())
        assert (second.name, second.weight) == ("bench-1", 1.0)
    assert all(registry.directory().tenant_of(key) is None for key in made.values())


def test_they_are_used_again_with_other_keys_and_weights(registry: TenantRegistry) -> None:
    with made_tenants(registry, ["a"], {"a": 3.0}) as before:
        pass
    with made_tenants(registry, ["b"], {}) as after:
        assert before["a"] != after["b"]
        assert [(one.name, one.weight, len(one.live_keys)) for one in registry.stored().values()] == [
            ("bench-0", 1.0, 1)
        ]


def test_their_keys_are_revoked_however_a_benchmark_ends(registry: TenantRegistry) -> None:
    with pytest.raises(KeyboardInterrupt), made_tenants(registry, ["a", "b"], {}):
        raise KeyboardInterrupt
    assert [tenant.live_keys for tenant in registry.stored().values()] == [(), ()]


def test_a_tenant_of_such_a_name_that_is_somebodys_is_left_alone(registry: TenantRegistry) -> None:
    registry.add("bench-1", weight=5.0, limits=TenantLimits())
    with pytest.raises(ValueError, match="Tenant bench-1 has a key in use"), made_tenants(registry, ["a", "b"], {}):
        pytest.fail("somebody's tenant is used")
    stored = registry.stored()
    assert (stored["bench-1"].weight, len(stored["bench-1"].live_keys)) == (5.0, 1)
    assert stored["bench-0"].live_keys == ()
