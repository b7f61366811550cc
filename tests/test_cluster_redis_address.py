"""Goal: settings of a Redis that would give state away, or could not work, are refused with a sentence that names the mend.

Method: addresses of every kind; real files of every mode. No network is needed: names are looked up in a table.
"""

import os
import re
import socket
from pathlib import Path

import pytest

from cluster import redis_address
from cluster.redis_address import RedisAddress, addresses_of, is_public, read_password, refuse_if_exposed

PUBLIC, PRIVATE = "8.8.8.8", "10.0.0.7"


@pytest.mark.parametrize(
    ("url", "address", "text"),
    [
        ("redis://h", ("h", 6379, 0, False), "redis://h:6379/0"),
        ("rediss://h:1/", ("h", 1, 0, True), "rediss://h:1/0"),
        ("redis://10.0.0.7:6380/15", ("10.0.0.7", 6380, 15, False), "redis://10.0.0.7:6380/15"),
        ("redis://[::1]:6380/2", ("::1", 6380, 2, False), "redis://[::1]:6380/2"),
    ],
)
def test_an_address_is_read_and_written(url: str, address: tuple[str, int, int, bool], text: str) -> None:
    assert RedisAddress.parse(url) == address
    assert str(RedisAddress.parse(url)) == text


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("redis://:hunter2@h:6379/0", "put it into a file and name it in redis_password_file"),
        ("redis://u:hunter2@h", "put it into a file and name it in redis_password_file"),
        ("redis://u@h", "put it into redis_username"),
        ("http://h", "must be redis://HOST:6379/0"),
        ("unix:///tmp/socket", "must be redis://HOST:6379/0"),
        ("h:6379", "must be redis://HOST:6379/0"),
        ("redis://", "must be redis://HOST:6379/0"),
        ("", "must be redis://HOST:6379/0"),
        ("redis://h:x", "write it as redis://HOST:6379/0"),
        ("redis://h:99999", "write it as redis://HOST:6379/0"),
        ("redis://[h", "write it as redis://HOST:6379/0"),
        ("redis://h/one", "the number of a database"),
        ("redis://h/-1", "the number of a database"),
        ("redis://h/0?ssl_cert_reqs=none", "the number of a database"),
        ("redis://h/0#1", "the number of a database"),
    ],
)
def test_what_is_no_address_is_refused_with_the_mend_and_without_the_secret(url: str, mend: str) -> None:
    with pytest.raises(ValueError, match=re.escape(mend)) as caught:
        RedisAddress.parse(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("addresses", "public"),
    [
        ([PUBLIC], True),
        (["2001:4860:4860::8888"], True),
        (["::ffff:8.8.8.8"], True),
        ([PRIVATE, PUBLIC], True),
        ([], True),
        ([PRIVATE, "127.0.0.1", "192.168.1.1", "172.16.0.1", "::1", "fd00::1", "169.254.1.1", "100.64.0.1"], False),
        (["::ffff:10.0.0.7"], False),
    ],
)
def test_a_host_is_public_if_one_of_its_addresses_is_or_none_is_known(addresses: list[str], public: bool) -> None:
    assert is_public(addresses) == public


@pytest.fixture
def known_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"public": PUBLIC, "private": PRIVATE}

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if host not in hosts:
            raise socket.gaierror(-2, "unknown")
        return [(2, 1, 6, "", (hosts[host], 0))]

    monkeypatch.setattr(redis_address.socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("known_hosts")
@pytest.mark.parametrize(
    ("url", "has_password", "mend"),
    [
        ("redis://public", False, "state.redis_password_file"),
        ("rediss://public", False, "state.redis_password_file"),
        ("redis://unknown", False, "state.redis_password_file"),
        ("redis://public", True, "use rediss://"),
        ("redis://unknown", True, "use rediss://"),
        ("rediss://public", True, None),
        ("rediss://unknown", True, None),
        ("redis://private", False, None),
        ("redis://private", True, None),
    ],
)
def test_a_redis_on_a_public_address_has_a_password_and_tls(url: str, has_password: bool, mend: str | None) -> None:
    address = RedisAddress.parse(url)
    if mend is None:
        refuse_if_exposed(address, has_password=has_password)
        return
    with pytest.raises(ValueError, match=mend) as caught:
        refuse_if_exposed(address, has_password=has_password)
    assert str(caught.value).startswith(f"state.redis_url: {address.host} ")


def test_this_hosts_own_names_are_known_and_no_names_are_not() -> None:
    assert not is_public(addresses_of("localhost"))
    assert not is_public(addresses_of("127.0.0.1"))
    assert addresses_of("\ud800") == addresses_of("a" * 300) == []


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [b"pass word", b"pass word\n", b"pass word\r\n"])
def test_a_password_is_the_line_in_its_file(tmp_path: Path, content: bytes) -> None:
    assert read_password(write(tmp_path / "p", content)) == "pass word"


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines\n", b"\x00", b"\xff", b"a" * 5000])
def test_a_file_without_one_line_of_text_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="must hold the password as one line of text"):
        read_password(write(tmp_path / "p", content))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ValueError, match="run chmod 600 on it"):
        read_password(write(tmp_path / "p", b"x", mode))


@pytest.mark.parametrize(("mode", "accepted"), [(0o440, True), (0o400, True), (0o444, False), (0o460, False)])
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_mounted_secret_is_anothers_and_read_by_its_group(tmp_path: Path, mode: int, accepted: bool) -> None:
    path = write(tmp_path / "p", b"x", mode)
    os.chown(path, 12345, os.getgid())
    if accepted:
        assert read_password(path) == "x"
        return
    with pytest.raises(ValueError, match="can be read by others"):
        read_password(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match=r"state.redis_password_file: .* cannot be read"):
            read_password(path)
