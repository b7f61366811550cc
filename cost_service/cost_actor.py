"""The cost service as one Ray actor for the whole cluster (shell around `cost_service.service` and `length_service`).

Rules:
- Refitting and storing run in threads of their own, so that calls wait for no longer than one kind's arithmetic.
- Replicas exchange samples for snapshots, and ingresses finished requests for those of others; how, and what they do while
  it is away, says `cost_service.named_actor`.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from cost_service.keeper import Keeper
from cost_service.length_service import SAVE_INTERVAL_S, LengthService
from cost_service.metrics import LEARNED_COST_ERROR, REJECTED_COST_BATCHES
from cost_service.named_actor import log_as, start_actor
from cost_service.serve_metrics import LiveCounter, LiveGauge
from cost_service.serve_state import StateLoop
from cost_service.service import ACTOR, REFIT_INTERVAL_S, CostService, Kind
from cost_service.store import Store

logger = logging.getLogger("ray.serve")


class CostActor:
    """Takes what replicas measure and gives them the newest costs of their kind; takes and gives output lengths."""

    def __init__(self, store: Store) -> None:
        log_as(ACTOR)
        self._service, self._lengths = CostService(), LengthService()
        self._lock, self._lengths_lock = threading.Lock(), threading.Lock()
        self._error, self._rejected = LiveGauge(LEARNED_COST_ERROR), LiveCounter(REJECTED_COST_BATCHES)
        self._num_rejected = 0
        self._state = StateLoop(
            ACTOR,
            [
                Keeper(store, self._service, self._lock),
                Keeper(store, self._lengths, self._lengths_lock, save_interval_s=SAVE_INTERVAL_S),
            ],
        )
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
                    status, num_rejected = self._service.status(), self._service.num_rejected
                self._show(status, num_rejected)
            except Exception:
                logger.exception("Costs could not be learned from the last samples; the versions before stay in force.")

    def _show(self, status: Sequence[dict[str, Any]], num_rejected: int) -> None:
        self._rejected.inc(num_rejected - self._num_rejected)
        self._num_rejected = num_rejected
        for kind in status:
            for cost, ratio in kind["error_ratio"].items():
                self._error.set(ratio, tags={"model": kind["model"], "hardware": kind["hardware"], "cost": cost})


def start_cost_actor(store: Store) -> Any:
    """Start the actor where there is none yet; returns its handle at once."""
    return start_actor(CostActor, ACTOR, store, max_concurrency=8)
