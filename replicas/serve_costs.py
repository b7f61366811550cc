"""Exchanges what a replica's engine has measured for newer costs, beside requests and steps (shell around the cost actor).

Rule: the actor may be away at any time. Samples then wait, the oldest go first, and the engine goes on with what it has.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from cost_service.cost_actor import find_cost_actor
from cost_service.samples import Sample
from cost_service.service import Kind
from cost_service.snapshot import CostSnapshot
from replicas.channel import ServerEnd
from replicas.messages import CostSamples, SetCosts

logger = logging.getLogger("ray.serve")

INTERVAL_S = 0.5
TIMEOUT_S = 5.0
MAX_SAMPLES = 4096


class CostExchange:
    """One replica's end of the cost service."""

    def __init__(self, channel: ServerEnd, say_degraded: Callable[[bool], None]) -> None:
        """Begin with nothing.

        Args:
            say_degraded: Called with whether the cost service does not answer.
        """
        self._channel, self._say_degraded = channel, say_degraded
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._costs: str | None = None
        self._actor: Any = None

    def add(self, message: CostSamples) -> None:
        """Take what the engine has measured, to be sent on."""
        self._costs = message.costs
        self._samples.extend(message.samples)

    async def run(self) -> None:
        """Exchange for ever."""
        degraded = False
        while True:
            await asyncio.sleep(INTERVAL_S)
            if self._costs is None:
                continue
            try:
                await asyncio.wait_for(self._exchange(self._costs), TIMEOUT_S)
                now_degraded = False
            except Exception as error:  # Ray has many for an actor that is away; none may end this
                self._actor = None
                now_degraded = True
                if not degraded:
                    logger.warning(
                        "The cost service does not answer (%s): costs stay as they are.", type(error).__name__
                    )
            if now_degraded != degraded:
                degraded = now_degraded
                self._say_degraded(degraded)

    async def _exchange(self, costs: str) -> None:
        if self._actor is None:
            self._actor = await asyncio.to_thread(find_cost_actor)
            if self._actor is None:
                raise LookupError("there is none")
        if self._samples:
            batch = list(self._samples)
            await self._actor.observe.remote(costs, msgspec.json.encode(batch))
            for _ in range(min(len(batch), len(self._samples))):
                self._samples.popleft()
        mine = CostSnapshot.from_json(costs)
        newer = await self._actor.snapshot.remote(tuple(Kind.of(mine)), mine.version)
        if newer is not None and await self._channel.send(SetCosts(snapshot=newer)):
            self._costs = newer
