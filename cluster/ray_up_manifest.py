"""What a file for `ray up` is held to before anything starts.

Rules:
- Ray's own schema says which settings there are; the rest is ours. Nothing is asked of a cloud.
- Files of keys and tokens that the file names must be there, and their owner's alone: `ray up` copies them with their modes.
"""

import importlib.util
import ipaddress
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from cluster.cloud_settings import check_node, check_provider
from cluster.keys import refuse_if_open_to_others
from cluster.manifest_rules import TOKEN_MODE, check_command, texts
from cluster.settings_errors import refuse_unknown

TOKEN_FILE = "~/.ray/auth_token"

FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2=0"
"""Of Ray 2.60: `ray up` asks for the second one, which keeps on adding local workers and never starts one."""

PROJECT = (
    "cluster", "replicas", "global_scheduler", "cost_service", "pyproject.toml", "Makefile", "README.md", "LICENSE",
)  # fmt: skip
"""What `make setup` needs of the project."""

_SETUP = re.compile(r"\bcd (\S+) && make setup\b")
_HOST = re.compile(
    r"^(?!\d+(?:\.\d+)*$)[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*$"
)


def check_ray_up(document: dict[str, Any], folder: Path) -> None:
    """Refuse a cluster file that would not start, or not as it is meant.

    Args:
        folder: Where `ray up` is to run: relative paths are seen from there.

    Raises:
        ValueError: One sentence with the mend.
    """
    _check_schema(document)
    _check_nodes(document)
    for place, command in texts({name: value for name, value in document.items() if name.endswith("commands")}):
        check_command(place, command)
    for place, text in texts(document.get("available_node_types", {}), "available_node_types"):
        if place.endswith("commands") or "_commands[" in place:
            check_command(place, text)
    _check_start(document)
    _check_project(document)
    _check_files(document, folder)


@cache
def _schema() -> dict[str, Any]:
    spec = importlib.util.find_spec("ray")  # where Ray is, without the seconds that importing it takes
    assert spec is not None
    assert spec.origin is not None
    read: dict[str, Any] = json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())
    return read


def _check_schema(document: dict[str, Any]) -> None:
    refuse_unknown(document, _schema()["properties"], "")
    for name, node_type in document.get("available_node_types", {}).items():
        types = _schema()["properties"]["available_node_types"]["patternProperties"][".*"]
        refuse_unknown(node_type or {}, types["properties"], f"available_node_types.{name}.")
    refuse_unknown(document.get("auth", {}), _schema()["properties"]["auth"]["properties"], "auth.")
    error = jsonschema.exceptions.best_match(jsonschema.Draft7Validator(_schema()).iter_errors(document))
    if error is not None:
        place = ".".join(str(part) for part in error.absolute_path)
        raise ValueError(f"{place or 'The file'} is not what `ray up` takes: {error.message.splitlines()[0]}.")


def _check_nodes(document: dict[str, Any]) -> None:
    provider = document["provider"]
    check_provider(provider)
    if provider["type"] == "local":
        _check_own_machines(provider)
        return
    types = document.get("available_node_types", {})
    if document.get("head_node_type") not in types:
        raise ValueError("head_node_type must be one of available_node_types.")
    most = document.get("max_workers")
    for name, node_type in types.items():
        place = f"available_node_types.{name}."
        least, limit = node_type.get("min_workers", 0), node_type.get("max_workers", most)
        if limit is not None and least > limit:
            raise ValueError(f"{place}min_workers is {least}, above max_workers, which is {limit}: lower it.")
        check_node(provider["type"], node_type.get("node_config", {}), f"{place}node_config.")
    together = sum(node_type.get("min_workers", 0) for node_type in types.values())
    if most is not None and together > most:
        raise ValueError(f"max_workers is {most}, below the min_workers of all types together, {together}: raise it.")


def _check_own_machines(provider: dict[str, Any]) -> None:
    if "coordinator_address" in provider:
        return
    for name in ("head_ip", "worker_ips"):
        if name not in provider:
            raise ValueError(f"Setting provider.{name} is missing: add it.")
    machines = [("head_ip", provider["head_ip"])]
    machines += [(f"worker_ips[{index}]", address) for index, address in enumerate(provider["worker_ips"])]
    seen: dict[str, str] = {}
    for name, address in machines:
        if not _is_address(str(address)):
            raise ValueError(f"provider.{name} is {address}: give an IP address or the name of a host.")
        if str(address) in seen:
            raise ValueError(f"provider.{name} is {address}, as is provider.{seen[str(address)]}: leave one.")
        seen[str(address)] = name


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.match(text) is not None
    return True


def _check_start(document: dict[str, Any]) -> None:
    """Every node asks for the token, and has it."""
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in document.get(field, []) if "ray start" in command]
        if not starts:
            raise ValueError(
                f"{field} must hold a `ray start`: without it Ray's default opens the dashboard to everybody."
            )
        for command in starts:
            if TOKEN_MODE not in command:
                raise ValueError(f"{field} start Ray without authentication: export {TOKEN_MODE} before `ray start`.")
    if document["provider"].get("type") == "local" and FIRST_AUTOSCALER not in " ".join(
        document["head_start_ray_commands"]
    ):
        raise ValueError(
            f"head_start_ray_commands lack {FIRST_AUTOSCALER}: Ray's second autoscaler starts no local workers."
        )
    if TOKEN_FILE not in document.get("file_mounts", {}):
        raise ValueError(f"file_mounts lack {TOKEN_FILE}, by which nodes know each other: add it.")


def _check_project(document: dict[str, Any]) -> None:
    """What the commands set up is mounted, as a whole or part by part."""
    mounted = {str(remote).rstrip("/") for remote in document.get("file_mounts", {})}
    for _, command in texts({name: value for name, value in document.items() if name.endswith("commands")}):
        for root in _SETUP.findall(command):
            missing = [name for name in PROJECT if f"{root}/{name}" not in mounted]
            if missing and root not in mounted:
                raise ValueError(f"file_mounts lack {root}/{missing[0]}, which `make setup` needs: add it.")


def _check_files(document: dict[str, Any], folder: Path) -> None:
    """What is mounted is there, and keys are their owner's alone."""
    for remote, local in document.get("file_mounts", {}).items():
        path = folder / Path(local).expanduser()
        if not path.exists():
            mend = (
                "run `.venv/bin/ray get-auth-token --generate`"
                if remote == TOKEN_FILE
                else "correct it, or run this elsewhere"
            )
            raise ValueError(f"file_mounts name {local}, which does not exist: {mend}.")
        if str(local).startswith("~") and path.is_file():
            refuse_if_open_to_others(path)
    key = document.get("auth", {}).get("ssh_private_key")
    if key is not None:
        path = folder / Path(key).expanduser()
        if not path.is_file():
            raise ValueError(
                f"auth.ssh_private_key is {key}, which does not exist: make it with ssh-keygen, or correct it."
            )
        refuse_if_open_to_others(path)
