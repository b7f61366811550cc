"""Goal: a key is known by its hash alone, and nobody but its owner can read what is on disk.

Method: a new installation in a temporary folder, looked at as files; each kind of damage once.
"""

import hashlib
import json
import os
import re
import stat
from pathlib import Path

import pytest

from cluster import keys
from cluster.keys import Keyring, hash_key, load_or_create, new_key, write_secret


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def installation(folder: Path, text: str, permissions: int = 0o600) -> Path:
    """An installation whose key file holds a text."""
    path = folder / "keys.json"
    path.write_text(text)
    path.chmod(permissions)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "home"


# A new installation


def test_a_new_installation_gets_a_key_of_the_default_tenant(home: Path) -> None:
    keyring = load_or_create(home)
    key = keys.bootstrap_key_path(home).read_text().strip()
    assert key.startswith("sk-adaptive-")
    assert keyring.tenant_of(key) == "default"


def test_the_key_file_holds_the_hash_and_not_the_key(home: Path) -> None:
    load_or_create(home)
    key = keys.bootstrap_key_path(home).read_text().strip()
    stored = (home / "keys.json").read_text()
    assert key not in stored
    assert json.loads(stored) == {hashlib.sha256(key.encode()).hexdigest(): "default"}


def test_only_the_owner_can_read_what_is_on_disk_whatever_the_umask(home: Path) -> None:
    before = os.umask(0)
    try:
        load_or_create(home)
    finally:
        os.umask(before)
    assert mode(home) == 0o700
    assert {path.name: mode(path) for path in home.iterdir()} == {"keys.json": 0o600, "api_key": 0o600}


def test_an_installation_keeps_its_keys(home: Path) -> None:
    first = load_or_create(home).to_mapping()
    assert load_or_create(home).to_mapping() == first


def test_keys_are_new_every_time_and_hold_256_random_bits() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert {len(key.removeprefix("sk-adaptive-")) for key in made} == {43}  # 32 bytes in base64


# Asking for a tenant


def test_each_key_belongs_to_its_tenant() -> None:
    keyring = Keyring({hash_key("key of a"): "a", hash_key("key of b"): "b"})
    assert keyring.tenant_of("key of a") == "a"
    assert keyring.tenant_of("key of b") == "b"


@pytest.mark.parametrize(
    "key", ["", "key of a ", "Key of a", "key of b", "\0", "ü", "\ud800", "key of a\udcff", "x" * 100_000]
)
def test_a_wrong_key_has_no_tenant_whatever_text_it_is(key: str) -> None:
    assert Keyring({hash_key("key of a"): "a"}).tenant_of(key) is None


def test_a_hash_is_no_key() -> None:
    known = hash_key("key of a")
    assert Keyring({known: "a"}).tenant_of(known) is None


def test_a_ring_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    installation(tmp_path, "{}")
    assert load_or_create(tmp_path).tenant_of("") is None


def test_a_keyring_cannot_be_changed_through_what_it_gives_out() -> None:
    keyring = Keyring({hash_key("key of a"): "a"})
    keyring.to_mapping().clear()
    assert keyring.tenant_of("key of a") == "a"


# Damage


@pytest.mark.parametrize("permissions", [0o644, 0o640, 0o604, 0o620, 0o666, 0o610])
def test_a_key_file_that_others_may_open_is_refused(tmp_path: Path, permissions: int) -> None:
    path = installation(tmp_path, json.dumps({hash_key("a"): "a"}), permissions)
    with pytest.raises(
        ValueError, match=rf"^The key file {re.escape(str(path))} can be read by others: run chmod 600 on it\.$"
    ):
        load_or_create(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "1", '"a"', '{"a": "b"}', '{"é": "a"}', json.dumps({hash_key("a"): None}),
        json.dumps({hash_key("a"): 1}), json.dumps({hash_key("a").upper(): "a"}), json.dumps({hash_key("a") + "\n": "a"}),
    ],
)  # fmt: skip
def test_a_damaged_key_file_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = installation(tmp_path, text)
    with pytest.raises(
        ValueError, match=rf"^The key file {re.escape(str(path))} is damaged: restore it from a backup, or remove it"
    ):
        load_or_create(tmp_path)
    assert path.read_text() == text


def test_a_key_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = installation(tmp_path, "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is damaged"):
        load_or_create(tmp_path)


def test_no_damage_is_answered_with_a_key_or_a_hash(tmp_path: Path) -> None:
    known = hash_key("a")
    installation(tmp_path, json.dumps({known: 1}))
    with pytest.raises(ValueError, match="damaged") as caught:
        load_or_create(tmp_path)
    assert known not in str(caught.value)


# Writing


def test_a_secret_replaces_its_file_whole_and_narrows_its_mode(tmp_path: Path) -> None:
    path = installation(tmp_path, "old", 0o644)
    write_secret(path, "new")
    assert path.read_text() == "new"
    assert mode(path) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_a_file_left_by_a_crash_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    (tmp_path / "keys.json.new").write_text("half")
    write_secret(path, "whole")
    assert path.read_text() == "whole"


def test_a_secret_does_not_follow_a_link_that_somebody_laid(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "keys.json.new").symlink_to(elsewhere)
    write_secret(tmp_path / "keys.json", "secret")
    assert elsewhere.read_text() == "untouched"
