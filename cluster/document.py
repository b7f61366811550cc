"""A document as text in a store, and what is wrong with one that is none (pure).

Rules:
- A record is JSON: `{"schema":1,"sha256":"...","document":...}`, the checksum that of the document's bytes; in this order,
  with nothing else, and no spaces.
- What is read is bounded before it is parsed, and its checksum is compared before the document is. Nothing in it is run.
- Damage is said once, until the record is whole again: stores are read every few seconds.
"""

import hashlib
import json
import logging
import re
from typing import Any

logger = logging.getLogger(__name__)

SCHEMA = 1
MAX_DOCUMENT_BYTES = 128 << 20
"""Beyond the counters of 64 replicas with 20,000 tenants at each."""

MAX_SAID = 1024
"""Damaged records of which is remembered that it was said."""


_HEAD = re.compile(rb'\{"schema":([0-9]{1,9}),"sha256":"([0-9a-f]{64})","document":')


def to_text(document: Any) -> bytes:
    """Return a document as JSON.

    Raises:
        OSError: It is too large.
    """
    text = json.dumps(document, sort_keys=True, allow_nan=False).encode()
    if len(text) > MAX_DOCUMENT_BYTES:
        raise OSError(f"a document of {len(text)} bytes is too large to be stored; the limit is {MAX_DOCUMENT_BYTES}")
    return text


def sha256(text: bytes) -> str:
    """The checksum of a document's text, in hex."""
    return hashlib.sha256(text).hexdigest()


def to_record(document: Any) -> bytes:
    """Return a document as a record.

    Raises:
        OSError: It is too large.
    """
    text = to_text(document)
    return b'{"schema":%d,"sha256":"%s","document":%s}' % (SCHEMA, sha256(text).encode(), text)


def from_record(record: bytes) -> bytes:
    """Return the text of the document in a record.

    Raises:
        ValueError: It is no record of ours, or not the one that was written; says which.
    """
    head = _HEAD.match(record)
    if head is None or not record.endswith(b"}"):
        raise ValueError("it is no record of ours")
    if int(head[1]) != SCHEMA:
        raise ValueError(f"it has schema {int(head[1])}, and this version reads {SCHEMA}")
    text = record[head.end() : -1]
    if sha256(text) != head[2].decode():
        raise ValueError("its checksum is wrong")
    return text


class DamageLog:
    """Says what is wrong with a store's records."""

    def __init__(self, store: str) -> None:
        """Begin with nothing said.

        Args:
            store: Where that is, for people.
        """
        self._store = store
        self._said: dict[str, None] = {}

    def damaged(self, place: str, why: str) -> None:
        """Note that a record is damaged."""
        if place not in self._said and len(self._said) < MAX_SAID:
            self._said[place] = None
            logger.warning("%.200r in %s is damaged and left out: %s.", place, self._store, why)

    def whole(self, place: str) -> None:
        """Note that a record is whole."""
        self._said.pop(place, None)
