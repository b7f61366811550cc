"""`python -m cluster tenants`: who is served, with which keys, weight and caps.

It works on the store of an installation, whether anything runs or not; running ingresses follow within 5 seconds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from cluster import keys
from cluster.config import load
from cluster.serve import DEFAULT_CONFIG
from cluster.settings_errors import of_file
from cluster.stores import check_store, open_store
from cluster.tenant_limits import TenantLimits
from cluster.tenant_registry import Tenant, TenantRegistry

COLUMNS = (("tenant", 24), ("weight", 8), ("concurrent", 12), ("queued", 12), ("queued tokens", 15), ("keys", 32))
CAPS = tuple(field.name for field in fields(TenantLimits))
NOT_GIVEN = -1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="Serve config file that says where the store is"
    )
    common.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the result to FILE, for its owner alone (- for standard output)",
    )
    commands = parser.add_subparsers(dest="change", required=True, metavar="CHANGE")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[common])
        if name != "list":
            made.add_argument("name", help="the tenant's name")
        return made

    add = command("add", "make a tenant and show its first key, this once")
    add.add_argument("--weight", type=float, default=1.0, help="share, relative to other tenants' (default: 1)")
    add.add_argument("--another-key", action="store_true", help="give a tenant that is there one more key instead")
    _add_caps(add)
    command("list", "show all tenants")
    command("weight", "change a tenant's weight").add_argument("weight", type=float, help="above 0; 1 is usual")
    _add_caps(command("limit", "change a tenant's caps; those that are not given stay"))
    command("revoke", "revoke a tenant's keys").add_argument("--key", metavar="ID", help="only this one of `list`")


def main(options: argparse.Namespace) -> int:
    """Do it; 0, or 2 with one sentence when it cannot be done."""
    try:
        state = load(options.config).args.state
        check_store(state)
        registry = TenantRegistry(open_store(state), keys.load(state.path).to_mapping())
        text, result = CHANGES[options.change](registry, options)
        if options.json is None:
            print(text)
        elif str(options.json) == "-":
            print(json.dumps(result, indent=2))
        else:
            keys.write_secret(options.json, json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"Error: {of_file(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    return 0


def _add(registry: TenantRegistry, options: argparse.Namespace) -> tuple[str, Any]:
    caps = _caps(options)
    if not options.another_key:
        key = registry.add(options.name, weight=options.weight, limits=TenantLimits(**caps))
    elif caps or options.weight != 1.0:
        raise ValueError("--another-key changes nothing else: use `weight` and `limit` for the rest.")
    else:
        key = registry.add_key(options.name)
    told = f"Key {keys.key_id(keys.hash_key(key))} of tenant {options.name}, shown this once:\n{key}"
    return told, _document(registry.directory().tenants[options.name]) | {"key": key}


def _list(registry: TenantRegistry, options: argparse.Namespace) -> tuple[str, Any]:
    tenants = sorted(registry.directory().tenants.values(), key=lambda tenant: tenant.name)
    return table(tenants), {"tenants": [_document(tenant) for tenant in tenants]}


def _weight(registry: TenantRegistry, options: argparse.Namespace) -> tuple[str, Any]:
    tenant = registry.set_weight(options.name, options.weight)
    return f"Tenant {tenant.name} has weight {tenant.weight:g}.", _document(tenant)


def _limit(registry: TenantRegistry, options: argparse.Namespace) -> tuple[str, Any]:
    caps = _caps(options)
    if not caps:
        raise ValueError(f"Give at least one of {', '.join(map(_option, CAPS))}.")
    tenant = registry.set_limits(options.name, caps)
    told = ", ".join(f"{_option(name)[2:]} {_shown(getattr(tenant.limits, name))}" for name in CAPS)
    return f"Tenant {tenant.name}: {told}.", _document(tenant)


def _revoke(registry: TenantRegistry, options: argparse.Namespace) -> tuple[str, Any]:
    registry.revoke(options.name, options.key)
    tenant = registry.directory().tenants[options.name]
    return f"Tenant {tenant.name} has {len(tenant.live_keys)} keys now.", _document(tenant)


CHANGES: dict[str, Callable[[TenantRegistry, argparse.Namespace], tuple[str, Any]]] = {
    "add": _add, "list": _list, "weight": _weight, "limit": _limit, "revoke": _revoke,
}  # fmt: skip


def table(tenants: list[Tenant]) -> str:
    """Render tenants for a terminal."""
    lines = ["".join(name.rjust(width) for name, width in COLUMNS)]
    for tenant in tenants:
        ids = " ".join(keys.key_id(key.sha256) for key in tenant.live_keys) or "-"
        cells = [tenant.name, f"{tenant.weight:g}", *(_shown(getattr(tenant.limits, name)) for name in CAPS), ids]
        lines.append("".join(" " + str(cell).rjust(width - 1) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))
    return "\n".join(lines)


def _document(tenant: Tenant) -> dict[str, Any]:
    """What is told of a tenant in JSON: keys by their ids, not by their hashes."""
    told = [{"id": keys.key_id(key.sha256), "since": key.since, "revoked": key.revoked} for key in tenant.keys]
    return {"name": tenant.name, "weight": tenant.weight, "limits": asdict(tenant.limits), "keys": told}


def _add_caps(parser: argparse.ArgumentParser) -> None:
    for name, text in zip(
        CAPS, ("requests in work", "requests without output yet", "prompt tokens of these"), strict=True
    ):
        parser.add_argument(
            _option(name), type=_cap, default=NOT_GIVEN, metavar="N", help=f"most {text}; `none`: no cap"
        )


def _caps(options: argparse.Namespace) -> dict[str, int | None]:
    return {name: value for name in CAPS if (value := getattr(options, name)) != NOT_GIVEN}


def _cap(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError("must be a whole number above 0, or none")
    return int(text)


def _option(cap: str) -> str:
    return f"--{cap.replace('_', '-')}"


def _shown(cap: int | None) -> str:
    return "-" if cap is None else str(cap)
