"""A store in memory, as the product's writes documents, and services kept in one."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from cost_service.keeper import Keeper, Kept
from cost_service.store import Store


class MemoryStore:
    """Documents as JSON text with sorted keys, as `cluster.state` writes them; `problem` is what every call fails with."""

    is_shared = False

    def __init__(self) -> None:
        self.texts: dict[tuple[str, str], str] = {}
        self.problem: OSError | None = None
        self.is_full = False
        self.num_saved = 0

    def load(self, collection: str) -> Mapping[str, Any]:
        return {name: json.loads(self.texts[collection, name]) for name in self.names(collection)}

    def names(self, collection: str) -> frozenset[str]:
        self._fail()
        return frozenset(name for place, name in self.texts if place == collection)

    def save(self, collection: str, name: str, document: Any) -> None:
        self.update(collection, name, lambda _: document)

    def update(self, collection: str, name: str, change: Callable[[Any | None], Any]) -> Any:
        self._fail()
        text = self.texts.get((collection, name))
        document = change(None if text is None else json.loads(text))
        if self.is_full:
            raise OSError("no space")
        self.texts[collection, name] = json.dumps(document, sort_keys=True)
        self.num_saved += 1
        return document

    def _fail(self) -> None:
        if self.problem is not None:
            raise self.problem


def kept(service: Kept, store: Store) -> Keeper:
    """Keep a service in a store; the first round is done."""
    keeper = Keeper(store, service, nullcontext())
    keeper.keep(0.0)
    return keeper
