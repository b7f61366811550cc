"""Keeps what a service knows in a store that may be away, full, or emptied at any time.

Data flow, each round: the store's documents -> the service, once; then the service's news -> the store.

Rules:
- The service's memory is what is true. What cannot be written stays there, newest only, and is written by a later round.
- Nothing is written before what is stored was read, so that a service that starts in an outage does not overwrite it with
  nothing. What is read late the service joins with what it has learned since.
- What was written and is no longer there, because somebody emptied the store or damaged it, is written anew.
- The service is locked while it reads or tells, never while the store is asked. No clock: the caller says what time it is.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cost_service.store import Store

CHECK_INTERVAL_S = 3.0
"""Between two looks whether what was written is still there."""


class Kept(Protocol):
    """A service whose state is kept."""

    @property
    def collections(self) -> Collection[str]:
        """Where its documents lie."""
        ...

    def restore(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Take stored documents, by collection and name, once; a damaged one is said and left out. The service may have
        begun without them."""
        ...

    def unsaved(self) -> Iterator[tuple[str, str, Any]]:
        """Documents that have changed since they were yielded last, as arguments for the store's `save`."""
        ...

    def forget_saved(self) -> None:
        """Let all documents count as unsaved."""
        ...


class Keeper:
    """One service's end of a store."""

    def __init__(
        self, store: Store, service: Kept, lock: AbstractContextManager[Any], *, save_interval_s: float = 0.0
    ) -> None:
        """Begin with nothing read.

        Args:
            lock: Of the service.
            save_interval_s: Between two times that news are written; what is missing in the store is written at once.
        """
        self._store, self._service, self._lock, self._save_interval_s = store, service, lock, save_interval_s
        self._written: set[tuple[str, str]] = set()
        self._check_at_s = self._save_at_s = 0.0
        self.is_restored = False
        """Whether what is stored was read."""

    def keep(self, now_s: float) -> None:
        """One round.

        Raises:
            OSError: The store is away or full; a later round does what this one could not.
        """
        try:
            self._keep(now_s)
        except OSError:
            self._check_at_s = self._save_at_s = 0.0  # it may come back empty
            raise

    def _keep(self, now_s: float) -> None:
        if not self.is_restored:
            documents = {collection: self._store.load(collection) for collection in self._service.collections}
            with self._lock:
                self._service.restore(documents)
            self._written = {(collection, name) for collection, found in documents.items() for name in found}
            self.is_restored = True
        elif now_s >= self._check_at_s:
            if self._is_any_missing():
                self._save_at_s = 0.0
                self._written.clear()
                with self._lock:
                    self._service.forget_saved()
            self._check_at_s = now_s + CHECK_INTERVAL_S
        if now_s >= self._save_at_s:
            self._save()
            self._save_at_s = now_s + self._save_interval_s

    def _is_any_missing(self) -> bool:
        for collection in self._service.collections:
            ours = {name for where, name in self._written if where == collection}
            if ours and not ours <= self._store.names(collection):
                return True
        return False

    def _save(self) -> None:
        with self._lock:
            documents = list(self._service.unsaved())
        try:
            for collection, name, document in documents:
                self._store.save(collection, name, document)
                self._written.add((collection, name))
        except OSError:
            with self._lock:
                self._service.forget_saved()
            raise
