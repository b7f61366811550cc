"""Where documents lie that outlive a process, as their users see it (`cluster.stores` makes one from the settings).

Rules:
- Documents are JSON values by collection and name. What is damaged is said and left out, and never run.
- Every call may fail with `OSError`: the store is full, damaged, or lets us do too little; with `ConnectionError`: it is
  away, and the next call would wait for it again. Nobody waits for it on a request's path.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Store(Protocol):
    """Documents that outlive a process."""

    @property
    def is_shared(self) -> bool:
        """Whether all nodes of a cluster reach the same documents."""
        ...

    def load(self, collection: str) -> Mapping[str, Any]:
        """Return the documents of a collection by name, without damaged ones."""
        ...

    def names(self, collection: str) -> frozenset[str]:
        """Return the names of a collection's documents, without damaged ones."""
        ...

    def save(self, collection: str, name: str, document: Any) -> None:
        """Replace a document."""
        ...

    def update(self, collection: str, name: str, change: Callable[[Any | None], Any]) -> Any:
        """Replace a document by what `change` makes of it, while nobody else writes it; return what is stored then.

        Args:
            change: Gets the document, None where there is none or a damaged one. What it raises leaves all as it was. It may
                be called several times.
        """
        ...
