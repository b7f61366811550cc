"""What survives a restart: JSON documents in a local SQLite file, each with its checksum.

Rules:
- The file and its folder are for their owner only (0600, 0700).
- A document whose checksum is wrong, and a file that is no database, are said and left out: starting matters more.
- Writes are transactions; SQLite's write-ahead log keeps readers and a killed writer apart.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from cluster.document import DamageLog, sha256, to_text

logger = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    collection TEXT NOT NULL,
    name TEXT NOT NULL,
    json TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (collection, name)
) WITHOUT ROWID
"""
TIMEOUT_S = 5.0
"""How long a write waits for another one."""


class SqliteStore:
    """Documents by collection and name, for one host (`cost_service.store.Store`).

    Every call opens the file anew: it may be on another process's way at any time.
    """

    is_shared = False

    def __init__(self, path: Path) -> None:
        """Open or make the file; one that is no database is put aside with a warning.

        Raises:
            OSError: The folder cannot be written.
        """
        self.path = path
        self._damage = DamageLog(str(path))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._make()
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(".damaged")
            logger.warning("%s is no database (%s): it is put aside as %s.", path, error, aside)
            path.replace(aside)
            self._make()

    def load(self, collection: str) -> Mapping[str, Any]:
        """Return the documents of a collection by name, without damaged ones.

        Raises:
            OSError: The file cannot be read.
        """
        return {name: json.loads(text) for name, text in self._read(collection)}

    def names(self, collection: str) -> frozenset[str]:
        """Return the names of a collection's documents, without damaged ones.

        Raises:
            OSError: The file cannot be read.
        """
        return frozenset(name for name, _ in self._read(collection))

    def save(self, collection: str, name: str, document: Any) -> None:
        """Replace a document.

        Raises:
            OSError: The file cannot be written.
        """
        self.update(collection, name, lambda _: document)

    def update(self, collection: str, name: str, change: Callable[[Any | None], Any]) -> Any:
        """Replace a document by what `change` makes of it, while nobody else writes; return what is stored then.

        Args:
            change: Gets the document, None where there is none or a damaged one. What it raises leaves all as it was.

        Raises:
            OSError: The file cannot be written.
        """
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute("BEGIN IMMEDIATE")
                before = connection.execute(
                    "SELECT json, sha256 FROM documents WHERE collection = ? AND name = ?", (collection, name)
                ).fetchone()
                is_whole = before is not None and self._is_whole(f"{collection}/{name}", *before)
                document = change(json.loads(before[0]) if is_whole else None)
                text = to_text(document)
                connection.execute(
                    "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)",
                    (collection, name, text.decode(), sha256(text)),
                )
        except sqlite3.Error as error:
            raise OSError(f"{self.path} cannot be written: {error}") from None
        return document

    def __reduce__(self) -> tuple[type["SqliteStore"], tuple[Path]]:
        """Travel as a path: where it arrives, the file is opened or made anew."""
        return (SqliteStore, (self.path,))

    def _make(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(self._connect()) as connection, connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(SCHEMA)

    def _read(self, collection: str) -> list[tuple[str, str]]:
        """Names and texts of the documents that are whole."""
        try:
            with closing(self._connect()) as connection:
                rows = connection.execute(
                    "SELECT name, json, sha256 FROM documents WHERE collection = ?", (collection,)
                ).fetchall()
        except sqlite3.Error as error:
            raise OSError(f"{self.path} cannot be read: {error}") from None
        return [(name, text) for name, text, checksum in rows if self._is_whole(f"{collection}/{name}", text, checksum)]

    def _is_whole(self, place: str, text: str, checksum: str) -> bool:
        """Whether a document is what was saved; says so if not."""
        if sha256(text.encode()) == checksum:
            self._damage.whole(place)
            return True
        self._damage.damaged(place, "its checksum is wrong")
        return False

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=TIMEOUT_S)
