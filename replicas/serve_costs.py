"""Exchanges what a replica's engine has measured for newer costs, beside requests and steps (shell around the cost actor).

Rule: the actor may be away at any time. Samples then wait, the oldest go first, and the engine goes on with what it has.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from cost_service.named_actor import exchange_for_ever
from cost_service.samples import Sample
from cost_service.service import ACTOR, Kind
from cost_service.snapshot import CostSnapshot
from replicas.channel import ServerEnd
from replicas.messages import CostSamples, SetCosts

INTERVAL_S = 0.5
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

    def add(self, message: CostSamples) -> None:
        """Take what the engine has measured, to be sent on."""
        self._costs = message.costs
        self._samples.extend(message.samples)

    async def run(self) -> None:
        """Exchange for ever."""
        await exchange_for_ever(
            ACTOR, self._exchange, self._say_degraded, interval_s=lambda: INTERVAL_S, kept="costs stay as they are"
        )

    async def _exchange(self, actor: Any) -> None:
        if self._costs is None:
            return
        if self._samples:
            batch = list(self._samples)
            await actor.observe.remote(self._costs, msgspec.json.encode(batch))
            for _ in range(min(len(batch), len(self._samples))):
                self._samples.popleft()
        mine = CostSnapshot.from_json(self._costs)
        newer = await actor.snapshot.remote(tuple(Kind.of(mine)), mine.version)
        if newer is not None and await self._channel.send(SetCosts(snapshot=newer)):
            self._costs = newer
