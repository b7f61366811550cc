"""The cost service as one Ray actor for the whole cluster (shell around `cost_service.service` and `length_service`).

Rules:
- Detached, restarted for ever, no CPU of its own: it comes back with what its store holds.
- Refitting runs in a thread of its own, so that calls wait for no longer than one kind's arithmetic.
- Nobody waits for it on a request's path or in an engine's step: replicas exchange samples for snapshots beside them, and
  ingresses finished requests for those of others.
- It may be away at any time: who exchanges goes on with what it has, says so once, and tries again.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import ray

from cost_service.length_service import SAVE_INTERVAL_S, LengthService
from cost_service.service import REFIT_INTERVAL_S, CostService, Kind, Store

logger = logging.getLogger("ray.serve")

NAME, NAMESPACE = "cost_service", "adaptivellm"
TIMEOUT_S = 5.0


class CostActor:
    """Takes what replicas measure and gives them the newest costs of their kind; takes and gives output lengths."""

    def __init__(self, store: Store) -> None:
        self._service, self._lengths = CostService(store), LengthService(store)
        self._lock, self._lengths_lock = threading.Lock(), threading.Lock()
        threading.Thread(target=self._refit_for_ever, daemon=True, name="refit").start()
        threading.Thread(target=self._save_lengths_for_ever, daemon=True, name="save").start()

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

    def exchange_lengths(self, report: bytes) -> bytes:
        """See `LengthService.exchange`."""
        with self._lengths_lock:
            return self._lengths.exchange(report)

    def lengths_status(self) -> dict[str, Any]:
        """See `LengthService.status`."""
        with self._lengths_lock:
            return self._lengths.status()

    def _refit_for_ever(self) -> None:
        while True:
            time.sleep(REFIT_INTERVAL_S)
            try:
                with self._lock:
                    self._service.refit()
            except Exception:
                logger.exception("Costs could not be learned from the last samples; the versions before stay in force.")

    def _save_lengths_for_ever(self) -> None:
        while True:
            time.sleep(SAVE_INTERVAL_S)
            try:
                with self._lengths_lock:
                    self._lengths.save()
            except Exception:
                logger.exception("Output lengths could not be stored; they are learned on.")


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


async def exchange_for_ever(
    exchange: Callable[[Any], Awaitable[None]], say_degraded: Callable[[bool], None], *, interval_s: float, kept: str
) -> NoReturn:
    """Call `exchange` with the actor again and again, whatever happens.

    Args:
        say_degraded: Called with whether the actor does not answer, when that changes.
        kept: What then stays as it is.
    """
    actor, degraded = None, False
    while True:
        await asyncio.sleep(interval_s)
        try:
            if actor is None:
                actor = await asyncio.to_thread(find_cost_actor)
                if actor is None:
                    raise LookupError("there is none")
            await asyncio.wait_for(exchange(actor), TIMEOUT_S)
            now_degraded = False
        except Exception as error:  # Ray has many for an actor that is away; none may end this
            actor, now_degraded = None, True
            if not degraded:
                logger.warning("The cost service does not answer (%s): %s as they are.", type(error).__name__, kept)
        if now_degraded != degraded:
            degraded = now_degraded
            say_degraded(degraded)
