"""`python -m cluster state backup FILE` and `restore FILE`: everything in the product's store, to a file and back.

Rules:
- A file is lines, each a record with its own checksum (`cluster.document`) of collection, name and document; the last one
  says how many there are. It is read whole before anything is written.
- It holds hashes of keys and the secret of the prefix caches: it is made for its owner alone.
- From one kind of store to the other, too: back up with one config, restore with the other.
- Restored into a store that a running application uses, nothing would last: it writes what it knows again. So stop it first.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster import cache_salt, tenant_registry
from cluster.config import load
from cluster.document import from_record, to_record
from cluster.keys import write_secret
from cluster.serve import DEFAULT_CONFIG
from cluster.settings_errors import of_file
from cluster.stores import check_store, open_store
from cost_service import length_service, service
from cost_service.store import Store
from global_scheduler import fairness_service

COLLECTIONS = (
    tenant_registry.TENANTS, tenant_registry.VERSION, cache_salt.COLLECTION, service.KEY, length_service.COLLECTION,
    fairness_service.WEIGHTS, fairness_service.POOLS,
)  # fmt: skip
"""All that the product stores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("backup", "write everything that is stored to a file, for its owner alone"),
        ("restore", "store what such a file holds; with the application stopped"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("file", type=Path, metavar="FILE")
        command.add_argument(
            "--config", type=Path, default=DEFAULT_CONFIG, help="Serve config file that says where the store is"
        )
        if name == "restore":
            command.add_argument("--replace", action="store_true", help="also into a store that has tenants already")


def main(options: argparse.Namespace) -> int:
    """Do it; 0, or 2 with one sentence when it cannot be done."""
    try:
        state = load(options.config).args.state
        check_store(state)
        if options.action == "backup":
            num = backup(open_store(state), options.file)
            print(f"{num} documents are in {options.file}.")
        else:
            num = restore(open_store(state), options.file, replace=options.replace)
            print(f"{num} documents are stored.")
    except (ValueError, OSError) as error:
        print(f"Error: {of_file(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    return 0


def backup(store: Store, path: Path) -> int:
    """Write a store's documents to a file; returns how many.

    Raises:
        OSError: The store or the file cannot be used.
    """
    lines = [
        to_record([collection, name, document]).decode()
        for collection in COLLECTIONS
        for name, document in sorted(store.load(collection).items())
    ]
    write_secret(path, "\n".join([*lines, to_record(len(lines)).decode()]) + "\n")
    return len(lines)


def restore(store: Store, path: Path, *, replace: bool) -> int:
    """Store what a file holds; returns how many documents.

    Args:
        replace: Whether documents that are there may be replaced. Those that the file does not name stay.

    Raises:
        ValueError: The file is none of `backup`, or the store has tenants and `replace` is not given; nothing has changed.
        OSError: The store or the file cannot be used.
    """
    try:
        documents = list(_read(path.read_bytes().splitlines()))
    except ValueError as error:
        raise ValueError(f"{path} is no backup, or not a whole one ({error}): take another one.") from None
    if not replace and store.names(tenant_registry.TENANTS):
        raise ValueError("The store has tenants already: give --replace, or restore into an empty one.")
    for collection, name, document in documents:
        store.save(collection, name, document)
    return len(documents)


def _read(lines: Iterable[bytes]) -> Iterator[tuple[str, str, Any]]:
    num, expected = 0, None
    for line in lines:
        read = json.loads(from_record(line))
        match read:
            case [str(collection), str(name), document] if expected is None and collection in COLLECTIONS:
                yield collection, name, document
                num += 1
            case int() if expected is None:
                expected = read
            case _:
                raise ValueError("a line has no place there")
    if num != expected:
        raise ValueError(f"{num} documents of {expected if expected is not None else 'more'}")
