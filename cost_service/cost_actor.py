"""The cost service as one Ray actor for the whole cluster (shell around `cost_service.service`).

Rules:
- Detached, restarted for ever, no CPU of its own: it comes back with what its store holds.
- Refitting runs in a thread of its own, so that calls wait for no longer than one kind's arithmetic.
- Nobody waits for it on a request's path or in an engine's step: replicas exchange samples for snapshots beside them.
"""

import logging
import threading
import time
from typing import Any

import ray

from cost_service.service import REFIT_INTERVAL_S, CostService, Kind, Store

logger = logging.getLogger("ray.serve")

NAME, NAMESPACE = "cost_service", "adaptivellm"


class CostActor:
    """Takes what replicas measure and gives them the newest costs of their kind."""

    def __init__(self, store: Store) -> None:
        self._service = CostService(store)
        self._lock = threading.Lock()
        threading.Thread(target=self._refit_for_ever, daemon=True, name="refit").start()

    def observe(self, costs: str, samples: bytes) -> int:
        """See `CostService.observe`."""
        with self._lock:
            return self._service.observe(costs, samples)

    def snapshot(self, kind: tuple[str, str, int, int], since_version: int = -1) -> str | None:
        """See `CostService.snapshot`."""
        with self._lock:
            return self._service.snapshot(Kind(*kind), since_version)

    def predict(self, kind: tuple[str, str, int, int], **work: int) -> dict[str, float]:
        """See `CostService.predict`."""
        with self._lock:
            return self._service.predict(Kind(*kind), **work)

    def status(self) -> list[dict[str, Any]]:
        """See `CostService.status`."""
        with self._lock:
            return list(self._service.status())

    def _refit_for_ever(self) -> None:
        while True:
            time.sleep(REFIT_INTERVAL_S)
            try:
                with self._lock:
                    self._service.refit()
            except Exception:
                logger.exception("Costs could not be learned from the last samples; the versions before stay in force.")


def start_cost_actor(store: Store) -> Any:
    """Start the actor where there is none yet; returns its handle at once."""
    options = {
        "name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0,
        "max_restarts": -1, "max_concurrency": 8,
    }  # fmt: skip
    return ray.remote(CostActor).options(**options).remote(store)


def find_cost_actor() -> Any | None:
    """The actor's handle; None while there is none. Asks the cluster: not for an event loop."""
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None
