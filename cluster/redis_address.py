"""Where a Redis is, and what of its settings is refused before anything starts.

Rules:
- An address holds no secret: a password lies in a file of its owner's, which is read where it is used, every time anew.
- A Redis on a public address has a password and TLS. A host whose address is not known counts as public.
- Every refusal is one sentence that names the setting and the mend, and repeats no secret.
"""

import ipaddress
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

DEFAULT_PORT = 6379
MAX_PASSWORD_BYTES = 4096


class RedisAddress(NamedTuple):
    """A Redis database."""

    host: str
    port: int
    database: int
    is_encrypted: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.is_encrypted else 'redis'}://{host}:{self.port}/{self.database}"

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Read `redis://HOST:PORT/DATABASE`, `rediss` for TLS; port and database may be left out.

        Raises:
            ValueError: It is no such address, or holds more; without the setting's name.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORT
        except ValueError:
            raise ValueError("is no address: write it as redis://HOST:6379/0") from None
        if parts.password is not None:
            raise ValueError("must not hold a password: put it into a file and name it in redis_password_file")
        if parts.username is not None or "@" in parts.netloc:
            raise ValueError("must not hold a user's name: put it into redis_username")
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise ValueError("must be redis://HOST:6379/0, or rediss:// for TLS")
        database = parts.path.removeprefix("/") or "0"
        if parts.query or parts.fragment or not (database.isascii() and database.isdigit() and len(database) <= 4):
            raise ValueError("must end with the number of a database, as in redis://HOST:6379/0")
        return cls(parts.hostname, port, int(database), parts.scheme == "rediss")


def refuse_if_exposed(address: RedisAddress, *, has_password: bool) -> None:
    """Hold a Redis to being where nobody else reads or writes it.

    Raises:
        ValueError: It is on a public address without a password or without TLS.
    """
    if has_password and address.is_encrypted:
        return
    if not is_public(addresses_of(address.host)):
        return
    where = f"{address.host} is a public address, or one that is not known here"
    if not has_password:
        raise ValueError(f"state.redis_url: {where}: set a password in Redis and state.redis_password_file.")
    raise ValueError(f"state.redis_url: {where}, and the password would be sent in the clear: use rediss:// (TLS).")


def addresses_of(host: str) -> list[str]:
    """The addresses of a host; none where it is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({str(entry[4][0]).partition("%")[0] for entry in found})


def is_public(addresses: Iterable[str]) -> bool:
    """Whether one of a host's addresses can be reached from anywhere; so it is taken to be where there are none."""
    known = [ipaddress.ip_address(address) for address in addresses]
    plain = [(one.ipv4_mapped or one) if isinstance(one, ipaddress.IPv6Address) else one for one in known]
    return not plain or any(one.is_global for one in plain)


def read_password(path: Path) -> str:
    """Read the password's file.

    Raises:
        ValueError: It is missing, others can read it, or it holds no single line.
    """
    setting = f"state.redis_password_file: {path}"
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_PASSWORD_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{setting} cannot be read ({error.strerror}): put the password there, mode 0600.") from None
    # A secret that Kubernetes mounts is another's file, which its group may read: that group is how we read it.
    ours = status.st_uid == os.getuid()
    if stat.S_IMODE(status.st_mode) & (0o077 if ours else 0o037):
        raise ValueError(f"{setting} can be read by others: run chmod 600 on it.")
    try:
        password = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        password = ""
    if not password or len(content) > MAX_PASSWORD_BYTES or not password.isprintable():
        raise ValueError(f"{setting} must hold the password as one line of text.")
    return password
