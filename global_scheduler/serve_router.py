"""Serve's request router for the replicas: turns what Serve knows into what placement asks for (shell).

Rules:
- Placement only: a replica is named at once, and the request waits in its engine. What a replica refuses, because it has
  `max_ongoing_requests`, is offered to the others, and again with a growing pause: only then do requests wait here, in no
  fair order. Caps of tenants are there so that it does not come to that.
- One router for each handle, so for each ingress. It knows its own requests at once and the others' by the next statistics.
- What a replica says is `STATS_TRANSIT_S` old at most when it arrives, beyond the age that comes with it: what was sent
  since then is not in it for sure. Statistics that are none leave the replica among those that have said nothing.
- Who calls a replica without a body of a request is placed too, as an empty prompt.
- Prompts are hashed and never kept.

Source: Ray 2.60 `serve/_private/request_router/request_router.py` (`RequestRouter`), `serve/_private/router.py`
(`_route_and_send_request_once`, the order of calls), `serve/experimental/round_robin_router.py` (`should_backoff`).
"""

import logging
import time
from collections.abc import Collection
from typing import Any

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cost_service.prompt_text import BYTES_PER_TOKEN, prompt_pieces, prompt_size
from cost_service.serve_metrics import degraded_gauge
from cost_service.service_messages import ROUTING_STATS, STAMP_TENANT, ReplicaLoad
from global_scheduler.placement import Placement, PlacementSettings
from global_scheduler.prefix_homes import Mark, prompt_marks

logger = logging.getLogger("ray.serve")

STATS_TRANSIT_S = 0.3
"""From a replica's answer to the controller's next round, and from there to here."""


class PlacementRouter(RequestRouter):
    """`request_router_class: global_scheduler.serve_router.PlacementRouter`."""

    def initialize_state(self, **settings: Any) -> None:
        """Take `request_router_kwargs`: the fields of `PlacementSettings`."""
        self._placement = Placement(PlacementSettings(**settings))
        self._heard: dict[str, tuple[str, int]] = {}
        """Epoch and sequence of what each replica said last."""

        self._running: dict[str, RunningReplica] = {}
        self._num_silent = 0
        self._degraded = degraded_gauge("routing_stats")

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take what the controller says: who is there, and what they say."""
        now_s = time.monotonic()
        self._running = {each.replica_id.unique_id: each for each in replicas}
        self._keep_to(self._running)
        for each in replicas:
            self._listen(each.replica_id.unique_id, each.routing_stats, now_s)
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A replica is gone before the controller says so."""
        self._running = {name: each for name, each in self._running.items() if name != replica_id.unique_id}
        self._keep_to(self._running)
        super().on_replica_actor_died(replica_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that the request is placed at, and all of them for the case that it refuses."""
        if pending_request is None or not len(self._placement):
            return [candidate_replicas]
        # Else Ray tries again without a pause, and nothing else runs meanwhile.
        pending_request.routing_context.should_backoff = True
        name = pending_request.metadata.internal_request_id
        self._placement.ended(name)  # it was refused, and is tried again
        body = pending_request.args[0] if pending_request.args else None
        tenant, num_tokens, marks = read_body(body)
        decision = self._placement.place(
            name, tenant=tenant, num_tokens=num_tokens, marks=marks, now_s=time.monotonic()
        )
        logger.debug("Placed: %s", decision)
        if decision.num_silent != self._num_silent:
            self._num_silent = decision.num_silent
            self._degraded.set(float(decision.num_silent > 0), tags={"part": "routing_stats"})
        pending_request.future.add_done_callback(lambda future: self._sent(name, future))
        return [[self._running[decision.replica]], candidate_replicas]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request is over, or was refused."""
        self._placement.ended(internal_request_id)

    def _sent(self, name: str, future: Any) -> None:
        """Serve has decided, or the client has left before."""
        if future.cancelled() or future.exception() is not None:
            self._placement.ended(name)
        else:
            self._placement.moved(name, future.result().replica_id.unique_id)

    def _keep_to(self, names: Collection[str]) -> None:
        for name in [each for each in self._heard if each not in names]:
            del self._heard[name]
            self._placement.down(name)
        for name in names:
            if name not in self._heard:
                self._heard[name] = ("", 0)
                self._placement.up(name)

    def _listen(self, name: str, stats: dict[str, Any], now_s: float) -> None:
        if ROUTING_STATS not in stats:
            return
        try:
            load = msgspec.convert(stats[ROUTING_STATS], ReplicaLoad)
        except msgspec.ValidationError as error:
            logger.warning("Replica %s says what no router understands: %s", name, error)
            return
        if (load.epoch, load.sequence) != self._heard[name]:
            self._heard[name] = (load.epoch, load.sequence)
            self._placement.report(name, load, as_of_s=now_s - load.age_s - STATS_TRANSIT_S, now_s=now_s)


def read_body(body: Any) -> tuple[str, int, list[Mark]]:
    """Return tenant, tokens and marks of what a replica is called with; nothing where it is no request of the API."""
    stamp = getattr(body, "vllm_xargs", None) or {}
    field = next((name for name in ("messages", "prompt") if getattr(body, name, None)), None)
    tenant = str(stamp.get(STAMP_TENANT, ""))
    if field is None:
        return tenant, 1, []
    prompt = {field: getattr(body, field)}
    num_prompts, num_tokens = prompt_size(prompt)
    salt = getattr(body, "cache_salt", None) or ""
    marks = prompt_marks(prompt_pieces(prompt), salt=salt, bytes_per_token=BYTES_PER_TOKEN)
    return tenant, max(1, num_prompts * num_tokens), marks
