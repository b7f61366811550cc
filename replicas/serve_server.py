"""One replica: Ray Serve's LLM server around a vLLM engine, plus our control channel to the engine's process.

Rules:
- The channel's address and our process id are in the environment before the engine starts; its processes inherit both.
- A request never waits for anything here; what other actors and people want to know is what the engine last reported.
"""

import asyncio
import logging
import os
import time
from functools import partial
from typing import Any

import msgspec
from ray import serve
from ray.serve.llm import LLMServer

from cost_service.service_messages import ROUTING_STATS, AutoscalingStats, ReplicaLoad
from replicas.channel import CHANNEL_VARIABLE, ServerEnd
from replicas.config import parse_admission, parse_policy
from replicas.messages import CostSamples, EngineTotals, ServiceReport, SetPolicy
from replicas.parent_watch import PARENT_VARIABLE
from replicas.serve_costs import CostExchange
from replicas.serve_engine import AdaptiveVLLMEngine
from replicas.serve_engine_metrics import EngineMetrics
from replicas.serve_fairness import FairnessExchange

logger = logging.getLogger("ray.serve")


class AdaptiveLLMServer(LLMServer):
    """The deployment class of a replica (`LLMConfig.server_cls: replicas.serve_server.AdaptiveLLMServer`)."""

    _default_engine_cls = AdaptiveVLLMEngine

    @classmethod
    def get_deployment_options(cls, llm_config: Any) -> dict[str, Any]:
        """Options without the setup hook: an empty one for which Ray starts spare processes that import everything."""
        options: dict[str, Any] = super().get_deployment_options(llm_config)
        options["ray_actor_options"]["runtime_env"].pop("worker_process_setup_hook", None)
        return options

    async def start(self) -> None:
        """Open the channel, then start the engine."""
        self._totals: EngineTotals | None = None
        self._totals_at_s = 0.0
        context = serve.get_replica_context()
        self._name = context.replica_id.unique_id
        self._load: ReplicaLoad | None = None
        self._metrics = EngineMetrics(self._name)
        self._channel = ServerEnd()
        os.environ[CHANNEL_VARIABLE] = self._channel.address
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        self._costs = CostExchange(self._channel, partial(self._metrics.say_degraded, "cost_service"))
        self._fairness = FairnessExchange(
            self._channel, partial(self._metrics.say_degraded, "fairness"), replica=self._name,
            pool=f"{context.app_name}/{self._llm_config.model_id}",
        )  # fmt: skip
        loops = (self._read_channel(), self._costs.run(), self._fairness.run())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        await super().start()

    async def status(self) -> dict[str, Any]:
        """What the engine last reported, and how many seconds ago; `totals` is None before its first step.

        `turnarounds`: tenant to the mean weighted turnaround of the last `num` of its requests that ended here.
        """
        totals = self._totals
        return {
            "replica": self._name,
            "pid": os.getpid(),
            "age_s": round(time.monotonic() - self._totals_at_s, 3) if totals else None,
            "totals": msgspec.to_builtins(totals) if totals else None,
            "turnarounds": msgspec.to_builtins(self._metrics.turnarounds),
        }

    async def set_policy(self, preemption: str | None = None, admission: str | None = None) -> dict[str, Any]:
        """Let the engine follow other policies; `taken` is False when it does not take the message in a second.

        Args:
            preemption: None leaves it as it is; so with admission.

        Raises:
            ValueError: No such policy.
        """
        message = SetPolicy(
            preemption=None if preemption is None else parse_policy(preemption),
            admission=None if admission is None else parse_admission(admission),
        )
        taken = await self._channel.send(message)
        return {"replica": self._name, "taken": taken}

    async def check_health(self) -> None:
        """The engine's health, and that its reports are still read."""
        for task in self._tasks:
            if task.done():
                task.result()  # raises what ended it
        await super().check_health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """For request routers: what the engine last said beside Ray's own entries.

        The same until the engine says something new: what has changed is sent to every router.
        """
        stats: dict[str, Any] = dict(await super().record_routing_stats())
        totals = self._totals
        if totals is not None:
            if self._load is None or (self._load.epoch, self._load.sequence) != (totals.epoch, totals.sequence):
                self._load = totals.load(time.monotonic() - self._totals_at_s)
            stats[ROUTING_STATS] = msgspec.to_builtins(self._load)
        return stats

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler: what the engine last said. One that has said nothing has nothing to do yet."""
        totals = self._totals
        stats = AutoscalingStats() if totals is None else totals.autoscaling(time.monotonic() - self._totals_at_s)
        return stats.to_numbers()

    async def _read_channel(self) -> None:
        while True:
            message = await self._channel.receive()
            if isinstance(message, CostSamples):
                self._costs.add(message)
            elif isinstance(message, ServiceReport):
                self._fairness.add(message)
                self._metrics.show_turnarounds(message)
            else:
                self._metrics.update(self._totals, message)
                self._totals, self._totals_at_s = message, time.monotonic()
                self._fairness.note(message, self._totals_at_s)
