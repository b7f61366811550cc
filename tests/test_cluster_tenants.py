"""Goal: an operator manages tenants with one command, sees a key once, and reads in one sentence what was wrong.

Method: the command itself on a real store in a folder of the test's own.
"""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import keys
from cluster.__main__ import main
from cluster.config import IMPORT_PATH
from cluster.state import SqliteStore
from cluster.tenant_copy import TenantCopy


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An installation that was served before."""
    home = tmp_path / "home"
    keys.load_or_create(home)
    return home


class Command:
    """`python -m cluster tenants` for one installation."""

    def __init__(self, home: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        args = {"replicas": {"kv_cache_bytes": 1 << 26}, "state": {"directory": str(home)}}
        config.write_text(yaml.safe_dump({"applications": [{"import_path": IMPORT_PATH, "args": args}]}))
        self._config, self._capsys = config, capsys

    def __call__(self, *arguments: str) -> str:
        assert main(["tenants", *arguments, "--config", str(self._config)]) == 0
        return self._capsys.readouterr().out

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json", "-"))

    def error(self, *arguments: str) -> str:
        assert main(["tenants", *arguments, "--config", str(self._config)]) == 2
        output = self._capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        return output.err.strip()


@pytest.fixture
def tenants(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(home, tmp_path / "serve.yaml", capsys)


def ingress(home: Path) -> TenantCopy:
    """What a running ingress knows."""
    copy = TenantCopy(SqliteStore(home / "state.sqlite"), keys.load(home).to_mapping())
    assert copy.refresh()
    return copy


def test_a_new_tenants_key_is_shown_once_and_accepted(tenants: Command, home: Path) -> None:
    text = tenants("add", "acme", "--weight", "2", "--max-concurrent-requests", "8")
    key = text.splitlines()[-1]
    assert key.startswith("sk-adaptive-")
    tenant = ingress(home).directory.tenant_of(key)
    assert tenant is not None
    assert (tenant.name, tenant.weight, tenant.limits.max_concurrent_requests) == ("acme", 2.0, 8)
    assert key not in tenants("list") + str(tenants.json("list"))
    for path in home.iterdir():
        assert key.encode() not in path.read_bytes(), path


def test_a_running_ingress_follows(tenants: Command, home: Path) -> None:
    running = ingress(home)
    key = tenants.json("add", "acme")["key"]
    another = tenants.json("add", "acme", "--another-key")["key"]
    running.refresh()
    assert running.directory.tenant_of(key) == running.directory.tenant_of(another) != None  # noqa: E711
    tenants("revoke", "acme", "--key", keys.key_id(keys.hash_key(key)))
    running.refresh()
    assert running.directory.tenant_of(key) is None
    assert running.directory.tenant_of(another) is not None
    assert "0 keys" in tenants("revoke", "acme")
    running.refresh()
    assert running.directory.tenant_of(another) is None


def test_the_list_shows_all_tenants_the_bootstrap_one_among_them(tenants: Command) -> None:
    tenants("add", "acme", "--max-queued-tokens", "1000")
    header, acme, default = tenants("list").splitlines()
    assert header.split() == ["tenant", "weight", "concurrent", "queued", "queued", "tokens", "keys"]
    assert acme.split()[:5] == ["acme", "1", "-", "-", "1000"]
    assert default.split()[:2] == ["default", "1"]
    told = tenants.json("list")["tenants"]
    assert [one["name"] for one in told] == ["acme", "default"]
    assert [key["revoked"] for one in told for key in one["keys"]] == [None, None]


def test_weights_and_limits_change_and_what_is_not_given_stays(tenants: Command) -> None:
    tenants("add", "acme", "--max-queued-requests", "5")
    assert tenants("weight", "acme", "0.5") == "Tenant acme has weight 0.5.\n"
    changed = tenants.json("limit", "acme", "--max-concurrent-requests", "3")
    assert changed["limits"] == {
        "max_concurrent_requests": 3, "max_queued_requests": 5, "max_queued_tokens": None,
    }  # fmt: skip
    changed = tenants.json("limit", "acme", "--max-queued-requests", "none")
    assert (changed["weight"], changed["limits"]["max_queued_requests"]) == (0.5, None)


def test_the_bootstrap_tenant_is_one_like_others(tenants: Command, home: Path) -> None:
    key = keys.bootstrap_key_path(home).read_text().strip()
    tenants("limit", "default", "--max-concurrent-requests", "1")
    tenant = ingress(home).directory.tenant_of(key)
    assert tenant is not None
    assert tenant.limits.max_concurrent_requests == 1
    tenants("revoke", "default")
    assert ingress(home).directory.tenant_of(key) is None


def test_it_works_before_anything_was_ever_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "new"
    tenants = Command(home, tmp_path / "serve.yaml", capsys)
    key = tenants.json("add", "acme")["key"]
    assert tenants.json("list")["tenants"][0]["name"] == "acme"
    keys.load_or_create(home)
    assert ingress(home).directory.tenant_of(key) is not None
    assert len(ingress(home).directory.tenants) == 2


def test_a_result_in_a_file_is_its_owners_alone(tenants: Command, tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    assert tenants("add", "acme", "--json", str(path)) == ""
    assert json.loads(path.read_text())["key"].startswith("sk-adaptive-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["weight", "nobody", "2"], "There is no tenant nobody"),
        (["add", "acme"], "There is a tenant acme already"),
        (["add", "default"], "There is a tenant default already"),
        (["add", "a b"], "The tenant's name must be"),
        (["add", "new", "--weight", "0"], "it must be from 0.001"),
        (["weight", "acme", "-1"], "it must be from 0.001"),
        (["weight", "acme", "nan"], "it must be from 0.001"),
        (["limit", "acme"], "Give at least one of --max-concurrent-requests"),
        (["limit", "acme", "--max-queued-tokens", "0"], "max_queued_tokens must be a whole number"),
        (["add", "acme", "--another-key", "--weight", "2"], "--another-key changes nothing else"),
        (["revoke", "acme", "--key", "12345678"], "Tenant acme has no key 12345678"),
        (["add", "new", "--json", "/nowhere/at/all"], "must be a file in a folder that exists"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tenants: Command, arguments: list[str], sentence: str) -> None:
    tenants("add", "acme")
    before = tenants.json("list")
    assert sentence in tenants.error(*arguments)
    assert tenants.json("list") == before


@pytest.mark.parametrize("cap", ["-1", "1.5", "x", "", "²"])
def test_a_cap_that_is_no_number_is_refused(tenants: Command, cap: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        tenants("add", "new", f"--max-queued-tokens={cap}")


def test_a_store_that_cannot_be_used_is_one_sentence(tenants: Command, home: Path) -> None:
    (home / "state.sqlite").mkdir()
    assert "Error: " in tenants.error("list")
