"""What a file for `ray up` is held to before anything starts.

Rules:
- Ray's own schema says which settings there are; the rest is ours. Nothing is asked of a cloud.
- Files of keys and tokens that the file names must be there, and their owner's alone: `ray up` copies them with their modes.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from cluster.keys import refuse_if_open_to_others
from cluster.manifest_rules import TOKEN_MODE, check_command, refuse_unknown, texts

TOKEN_FILE = "~/.ray/auth_token"

FIRST_AUTOSCALER = "RAY_enable_autoscaler_v2=0"
"""Of Ray 2.60: `ray up` asks for the second one, which keeps on adding local workers and never starts one."""

LOCAL_PROVIDER = {"type", "head_ip", "worker_ips", "external_head_ip", "coordinator_address"}
"""What Ray reads of `provider` for machines of one's own; its schema allows anything there."""


def check_ray_up(document: dict[str, Any], folder: Path) -> None:
    """Refuse a cluster file that would not start, or not as it is meant.

    Args:
        folder: Where `ray up` is to run: relative paths are seen from there.

    Raises:
        ValueError: One sentence with the mend.
    """
    _check_schema(document)
    _check_provider(document["provider"], document)
    for place, command in texts({name: value for name, value in document.items() if name.endswith("commands")}):
        check_command(place, command)
    for place, text in texts(document.get("available_node_types", {}), "available_node_types"):
        if place.endswith("commands") or "_commands[" in place:
            check_command(place, text)
    _check_start(document)
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


def _check_provider(provider: dict[str, Any], document: dict[str, Any]) -> None:
    if provider.get("type") != "local":
        types = document.get("available_node_types", {})
        if document.get("head_node_type") not in types:
            raise ValueError("head_node_type must be one of available_node_types.")
        return
    refuse_unknown(provider, LOCAL_PROVIDER, "provider.")
    if "coordinator_address" not in provider:
        for name in ("head_ip", "worker_ips"):
            if name not in provider:
                raise ValueError(f"Setting provider.{name} is missing: add it.")


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
