"""Goal: a backup brings everything back, into either kind of store, and a damaged one nothing.

Method: the commands themselves, on stores with tenants of which keys are known.
"""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import __main__
from cluster.backup import COLLECTIONS
from cluster.bootstrap import ROOT
from cluster.config import StateArgs, load
from cluster.document import to_record
from cluster.stores import open_store
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import TenantRegistry
from tests.redis_runs import needs_redis, redis_server


def config_of(state: StateArgs, path: Path) -> Path:
    document = yaml.safe_load((ROOT / "manifests" / "serve_local.yaml").read_text())
    document["applications"][0]["args"]["state"] = state.model_dump(exclude_none=True)
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a store with a document in every collection."""
    state = StateArgs(directory=str(tmp_path / "home"))
    store = open_store(state)
    for collection in COLLECTIONS:
        store.save(collection, "all", {"of": collection, "text": "\ud800\n"})
    return config_of(state, tmp_path / "serve.yaml")


def everything(config: Path) -> dict[str, Any]:
    store = open_store(load(config).args.state)
    return {collection: dict(store.load(collection)) for collection in COLLECTIONS}


def run(*arguments: object) -> int:
    return __main__.main(["state", *map(str, arguments)])


def test_a_backup_is_its_owners_alone_and_brings_everything_back(config: Path, tmp_path: Path) -> None:
    file, before = tmp_path / "backup", everything(config)
    assert run("backup", file, "--config", config) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    empty = config_of(StateArgs(directory=str(tmp_path / "other")), tmp_path / "other.yaml")
    assert run("restore", file, "--config", empty) == 0
    assert everything(empty) == before


@needs_redis
def test_tenants_and_their_keys_move_from_a_file_to_redis(tmp_path: Path) -> None:
    state = StateArgs(directory=str(tmp_path / "home"))
    key = TenantRegistry(open_store(state), {}).add("acme", weight=2.0, limits=TenantLimits())
    file, config = tmp_path / "backup", config_of(state, tmp_path / "serve.yaml")
    assert run("backup", file, "--config", config) == 0
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as server:
        in_redis = config_of(server.state(directory=str(tmp_path / "home")), tmp_path / "redis.yaml")
        assert run("restore", file, "--config", in_redis) == 0
        tenant = TenantRegistry(open_store(load(in_redis).args.state), {}).directory().tenant_of(key)
        assert tenant is not None
        assert (tenant.name, tenant.weight) == ("acme", 2.0)


def test_where_there_are_tenants_it_is_restored_only_if_asked_to(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, before = tmp_path / "backup", everything(config)
    run("backup", file, "--config", config)
    store = open_store(load(config).args.state)
    store.save("costs", "all", "changed")
    assert run("restore", file, "--config", config) == 2
    assert "give --replace" in capsys.readouterr().err
    assert store.load("costs") == {"all": "changed"}
    assert run("restore", file, "--config", config, "--replace") == 0
    assert everything(config) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[1:],
        lambda lines: [*lines, lines[0]],
        lambda lines: [*lines[:-1], lines[-1], lines[-1]],
        lambda lines: [lines[0].replace(b"tenants", b"tenantz"), *lines[1:]],
        lambda lines: [to_record(["elsewhere", "a", 1]), to_record(1)],
        lambda lines: [to_record({"a": 1}), to_record(1)],
        lambda lines: [b"junk"],
        lambda lines: [],
    ],
)
def test_a_damaged_backup_changes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    file = tmp_path / "backup"
    run("backup", file, "--config", config)
    file.write_bytes(b"\n".join(damage(file.read_bytes().splitlines())))
    empty = config_of(StateArgs(directory=str(tmp_path / "other")), tmp_path / "other.yaml")
    capsys.readouterr()
    assert run("restore", file, "--config", empty) == 2
    assert capsys.readouterr().err.startswith(f"Error: {file} is no backup, or not a whole one")
    assert everything(empty) == dict.fromkeys(COLLECTIONS, json.loads("{}"))


def test_a_file_that_is_not_there_is_one_sentence(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("restore", "/nowhere/backup", "--config", config) == 2
    mend = "cannot be used (No such file or directory): correct its name or its permissions."
    assert capsys.readouterr().err == f"Error: /nowhere/backup {mend}\n"
