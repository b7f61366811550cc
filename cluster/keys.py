"""API keys: made from 256 random bits, stored as SHA-256, compared in constant time.

Rules: a key is shown once and never stored in the clear, but for the bootstrap key of a new installation, which alone lives
in a file of mode 0600 so that a newcomer can find it. Random keys need no slow hash.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

BOOTSTRAP_TENANT = "default"


_NOBODY = ("0" * 64, None)


class Keyring:
    """Key hashes and the tenant each belongs to, found by the keys' ids."""

    def __init__(self, tenant_by_hash: Mapping[str, str]) -> None:
        self._tenant_by_hash = dict(tenant_by_hash)
        self._by_id: dict[str, list[tuple[str, str | None]]] = {}
        for known, tenant in tenant_by_hash.items():
            self._by_id.setdefault(key_id(known), []).append((known, tenant))

    def tenant_of(self, key: str) -> str | None:
        """Return the tenant of a key, or None.

        The time that it takes may tell whether a key's id is known, and nothing of the rest of its hash.
        """
        digest = hash_key(key)
        found = None
        for known, tenant in self._by_id.get(key_id(digest), [_NOBODY]):
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def to_mapping(self) -> dict[str, str]:
        """Hash to tenant, for the ingress replicas."""
        return dict(self._tenant_by_hash)


def new_key() -> str:
    """Return a fresh key."""
    return f"sk-adaptive-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key, in hex. Keys that are not valid text hash too, to a value that nobody has."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def key_id(sha256: str) -> str:
    """Return the name by which people and programs speak of a key: the first 32 bits of its hash, which are no secret."""
    return sha256[:8]


def load_or_create(directory: Path) -> Keyring:
    """Read the keyring of an installation; a new one gets a bootstrap key.

    Raises:
        ValueError: The keyring file is damaged, or others may read it.
    """
    if not _keys_path(directory).exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = new_key()
        write_secret(bootstrap_key_path(directory), key + "\n")
        write_secret(_keys_path(directory), json.dumps({hash_key(key): BOOTSTRAP_TENANT}))
    return load(directory)


def load(directory: Path) -> Keyring:
    """Read the keyring of an installation; empty where it has none yet.

    Raises:
        ValueError: The keyring file is damaged, or others may read it.
    """
    path = _keys_path(directory)
    if not path.exists():
        return Keyring({})
    refuse_if_open_to_others(path)
    try:
        stored = json.loads(path.read_text())
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or not all(
        re.fullmatch("[0-9a-f]{64}", known) and isinstance(tenant, str) for known, tenant in stored.items()
    ):
        raise ValueError(f"The key file {path} is damaged: restore it from a backup, or remove it to get a new key.")
    return Keyring(stored)


def bootstrap_key_path(directory: Path) -> Path:
    """Where a new installation's first key lies in the clear."""
    return directory / "api_key"


def _keys_path(directory: Path) -> Path:
    return directory / "keys.json"


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def refuse_if_open_to_others(path: Path) -> None:
    """Hold a file of keys to being its owner's alone.

    Raises:
        ValueError: Others may read it.
    """
    if path.stat().st_mode & 0o077:
        raise ValueError(f"The key file {path} can be read by others: run chmod 600 on it.")
