"""The fairness scheduler as one Ray actor for the whole cluster (shell around `global_scheduler.fairness_service`).

Rules:
- One call at a time: a call is some microseconds of arithmetic, and a second thread would only wait for it. What is slow,
  encoding and writing what is stored, happens in a thread of its own (`cost_service.serve_state`).
- What was reported since the last save is not lost with the actor: replicas tell totals, so that their next reports hold it.
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray

from cost_service.keeper import Keeper
from cost_service.metrics import (
    FAIRNESS_BOUND,
    FAIRNESS_GAP,
    FAIRNESS_GAP_OF_BOUND,
    FAIRNESS_REFUSED_REPORTS,
    FAIRNESS_REPLICAS,
    FAIRNESS_WORST_OF_BOUND,
    TENANT_SERVICE,
)
from cost_service.named_actor import log_as, start_actor
from cost_service.serve_metrics import LiveCounter, LiveGauge
from cost_service.serve_state import StateLoop
from cost_service.service_messages import ACTOR
from cost_service.store import Store
from cost_service.tenant_labels import TenantLabels
from global_scheduler.fairness_pool import PoolFigures
from global_scheduler.fairness_service import FairnessService

KEEP_S = 60.0
"""Figures of a pool that is no more are shown for so long."""


class FairnessActor:
    """Merges what replicas report, tells them what they need to know, and keeps it."""

    def __init__(self, store: Store) -> None:
        log_as(ACTOR)
        self._service = FairnessService(life=os.urandom(8).hex(), now_s=time.monotonic())
        self._metrics = _Metrics()
        self._lock = threading.Lock()
        self._state = StateLoop(ACTOR, [Keeper(store, self._service, self._lock)], each_round=self._tick)

    def exchange(self, report: bytes) -> bytes:
        """See `FairnessService.exchange`."""
        with self._lock:
            began_s = time.thread_time()
            answer = self._service.exchange(report, time.monotonic())
            self._service.took(time.thread_time() - began_s)
            return answer

    def set_weights(self, weights: Mapping[str, float]) -> str:
        """See `FairnessService.set_weights`."""
        with self._lock:
            return self._service.set_weights(weights)

    def status(self) -> dict[str, Any]:
        """See `FairnessService.status`; with the node and the process that it runs on."""
        with self._lock:
            told = self._service.status()
        return {**told, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}

    def _tick(self) -> None:
        with self._lock:
            self._service.tick(time.monotonic())
            self._metrics.update(self._service.figures(), self._service.num_refused)


class _Metrics:
    """Ray metrics of the cluster's fairness."""

    def __init__(self) -> None:
        self._service, self._refused = LiveCounter(TENANT_SERVICE), LiveCounter(FAIRNESS_REFUSED_REPORTS)
        self._gap, self._bound, self._ratio, self._worst = (
            LiveGauge(metric, keep_s=KEEP_S)
            for metric in (FAIRNESS_GAP, FAIRNESS_BOUND, FAIRNESS_GAP_OF_BOUND, FAIRNESS_WORST_OF_BOUND)
        )
        self._replicas = LiveGauge(FAIRNESS_REPLICAS)
        self._num_refused = 0
        self._labels = TenantLabels()
        self._counted: dict[tuple[str, str], float] = {}

    def update(self, pools: Mapping[str, PoolFigures], num_refused: int) -> None:
        """Export figures by pool."""
        self._refused.inc(num_refused - self._num_refused)
        self._num_refused = num_refused
        self._replicas.replace("pool", {pool: figures.num_replicas for pool, figures in pools.items()})
        for pool, figures in pools.items():
            if figures.worst_ratio is not None:
                self._worst.set(figures.worst_ratio, tags={"pool": pool})
            if figures.gap is not None and figures.stated is not None:
                tags = {"pool": pool}
                self._gap.set(figures.gap.gap, tags=tags)
                self._bound.set(figures.stated, tags=tags)
                self._ratio.set(figures.gap.ratio, tags=tags)
            for tenant, service in sorted(figures.served.items(), key=lambda one: -one[1]):
                added = service - self._counted.get((pool, tenant), 0.0)
                if added > 0.0:
                    self._counted[pool, tenant] = service
                    self._service.inc(added, tags={"pool": pool, "tenant": self._labels.label(tenant)})


def start_fairness_actor(store: Store) -> Any:
    """Start the actor where there is none yet; returns its handle at once."""
    return start_actor(FairnessActor, ACTOR, store)
