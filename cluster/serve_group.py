"""Several engines that are driven at the same time, as the replicas of one cluster (shell around arms, channels and actors).

Rules:
- A replica is an arm's process. What its server does in the product is done here by the same objects: it reads the control
  channel, exchanges what was measured for newer costs, and, where the group is joined, service for the cluster's counters.
- A group that is not joined has the same engines, each of which is fair by what it knows itself.
- vLLM's own scheduler has no channel.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from cluster.bench_arm import FIRST_COME, STOCK, Arm, EngineSettings
from cluster.config import StateArgs
from cluster.prompts import RequestSpec
from cluster.records import RunResult
from cluster.stores import open_store
from replicas.channel import CHANNEL_VARIABLE, ServerEnd
from replicas.messages import CostSamples, EngineTotals, ServiceReport

R = TypeVar("R")


@contextmanager
def cluster_actors(folder: Path) -> Iterator[None]:
    """A Ray cluster of this command's own with the product's actors, over a store in a folder."""
    import ray

    from cost_service.cost_actor import start_cost_actor
    from global_scheduler.fairness_actor import start_fairness_actor

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        store = open_store(StateArgs(directory=str(folder)))
        for actor in (start_cost_actor(store), start_fairness_actor(store)):
            ray.get(actor.status.remote())
        yield
    finally:
        ray.shutdown()


class EngineGroup:
    """Handle of a group. Whoever makes one closes it: `with EngineGroup(...) as group`."""

    def __init__(self, name: str, settings: EngineSettings, num_replicas: int, folder: Path, *, joined: bool) -> None:
        """Start all engines at once and wait until they are ready.

        Args:
            name: Of the group; the fairness actor keeps each group's counters by themselves.
            folder: For what the processes print.
            joined: Whether the cluster's counters are exchanged.

        Raises:
            RuntimeError: An engine did not start; with the end of its log.
        """
        self._name, self._joined = name, joined
        self._stack = ExitStack()
        has_channel = (settings.policy, settings.admission) != (STOCK, FIRST_COME)
        assert has_channel or not joined, "vLLM's own scheduler cannot be joined"
        try:
            self._servers = self._stack.enter_context(_Servers()) if has_channel else None
            with ThreadPoolExecutor(num_replicas) as threads:
                logs = [folder / f"{name.replace('/', '-')}-{number}.log" for number in range(num_replicas)]
                starting = [threads.submit(self._start, settings, log, self._open(log.stem)) for log in logs]
                self._arms = [one.result() for one in starting]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, parts: Sequence[Sequence[RequestSpec]], *, limit_s: float) -> list[RunResult]:
        """Drive every replica through its part of the requests, all at the same time.

        Raises:
            RuntimeError: A process ended, or did not answer; with the end of its log.
        """
        with ThreadPoolExecutor(len(self._arms)) as threads:
            pairs = zip(self._arms, parts, strict=True)
            running = [threads.submit(arm.run, part, limit_s=limit_s) for arm, part in pairs]
            try:
                return [one.result() for one in running]
            except BaseException:  # an interrupt, too: the threads wait for engines that would go on to their end
                self.close()
                raise

    def close(self) -> None:
        """End all engines and what runs beside them."""
        self._stack.close()

    def _start(self, settings: EngineSettings, log: Path, environment: Mapping[str, str]) -> Arm:
        return self._stack.enter_context(Arm(settings, log, environment))

    def _open(self, replica: str) -> dict[str, str]:
        """Begin to do what the replica's server does; return what its engine is told of it."""
        if self._servers is None:
            return {}
        return {CHANNEL_VARIABLE: self._servers.begin(replica, pool=self._name if self._joined else None)}


class _Servers:
    """What replicas' servers do beside requests, in an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="replicas' servers")
        self._thread.start()
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[ServerEnd] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._call(self._end())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def begin(self, replica: str, *, pool: str | None) -> str:
        """Serve one more replica; return its channel's address."""
        return self._call(self._begin(replica, pool))

    def _call(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(self, replica: str, pool: str | None) -> str:
        channel = ServerEnd()
        self._channels.append(channel)
        self._tasks.append(asyncio.create_task(_serve(channel, replica=replica, pool=pool)))
        return channel.address

    async def _end(self) -> None:
        """End all that was begun; what has ended one of them by itself is raised."""
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            channel.close()
        for error in ended:
            if isinstance(error, Exception):  # being cancelled is none
                raise error


async def _serve(channel: ServerEnd, *, replica: str, pool: str | None) -> None:
    """What `replicas.serve_server` does beside requests."""
    from replicas.serve_costs import CostExchange
    from replicas.serve_fairness import FairnessExchange

    costs = CostExchange(channel, lambda away: None)
    fairness = FairnessExchange(channel, lambda away: None, pool=pool, replica=replica) if pool is not None else None

    async def read() -> None:
        while True:
            message = await channel.receive()
            if isinstance(message, CostSamples):
                costs.add(message)
            elif fairness is not None and isinstance(message, EngineTotals):
                fairness.note(message, time.monotonic())
            elif fairness is not None and isinstance(message, ServiceReport):
                fairness.add(message)

    await asyncio.gather(read(), costs.run(), *([fairness.run()] if fairness is not None else []))
