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
from ray.util.metrics import Counter, Gauge

from cost_service.serve_metrics import degraded_gauge
from cost_service.service_messages import ROUTING_STATS, AutoscalingStats, ReplicaLoad
from replicas.channel import CHANNEL_VARIABLE, ServerEnd
from replicas.config import parse_admission, parse_policy
from replicas.messages import CostSamples, EngineTotals, ServiceReport, SetPolicy
from replicas.parent_watch import PARENT_VARIABLE
from replicas.serve_costs import CostExchange
from replicas.serve_engine import AdaptiveVLLMEngine
from replicas.serve_fairness import FairnessExchange
from replicas.turnaround import TurnaroundMeans

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
        self._metrics = _Metrics()
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
        """What the engine last reported, and how many seconds ago; `totals` is None before its first step."""
        totals = self._totals
        return {
            "replica": self._name,
            "pid": os.getpid(),
            "age_s": round(time.monotonic() - self._totals_at_s, 3) if totals else None,
            "totals": msgspec.to_builtins(totals) if totals else None,
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


class _Metrics:
    """Ray metrics of one replica."""

    def __init__(self) -> None:
        self._preemptions = Counter(
            "adaptivellm_preemptions_total", description="Requests that gave way.", tag_keys=("action",)
        )
        self._output_tokens = Counter("adaptivellm_output_tokens_total", description="Tokens delivered.")
        self._seconds = Counter(
            "adaptivellm_preemption_cost_seconds",
            description="Engine seconds that preemptions were predicted to cost, and did.",
            tag_keys=("action", "kind"),
        )
        self._error = Gauge(
            "adaptivellm_cost_model_error_ratio",
            description="How far predicted and measured seconds of preemptions are apart, relative to the measured ones.",
            tag_keys=("action",),
        )
        self._turnaround = Gauge(
            "adaptivellm_weighted_turnaround",
            description="How many times longer a tenant's last requests took here than they would have alone, as predicted.",
            tag_keys=("tenant",),
        )
        self._means = TurnaroundMeans()
        self._degraded = degraded_gauge()
        for part in ("cost_service", "fairness"):
            self.say_degraded(part, False)
        self._headroom = Gauge("adaptivellm_headroom_blocks", description="KV blocks kept free at admission.")
        self._host_slots = Gauge(
            "adaptivellm_host_pool_blocks", description="KV blocks of the host pool.", tag_keys=("state",)
        )

    def say_degraded(self, part: str, away: bool) -> None:
        self._degraded.set(float(away), tags={"part": part})

    def show_turnarounds(self, report: ServiceReport) -> None:
        for tenant, mean in self._means.read(report.epoch, report.ended).items():
            self._turnaround.set(mean, tags={"tenant": tenant})

    def update(self, before: EngineTotals | None, now: EngineTotals) -> None:
        if before is not None and before.epoch != now.epoch:
            before = None

        def increment(counter: Counter, field: str, tags: dict[str, str] | None = None) -> None:
            amount = getattr(now, field) - (getattr(before, field) if before else 0)
            if amount > 0:
                counter.inc(amount, tags=tags)

        increment(self._preemptions, "swaps", {"action": "swap"})
        increment(self._preemptions, "recomputes", {"action": "recompute"})
        increment(self._output_tokens, "output_tokens")
        for kind in ("predicted", "measured"):
            for action in ("swap", "recompute"):
                increment(self._seconds, f"{kind}_{action}_s", {"action": action, "kind": kind})
        for action in ("swap", "recompute"):
            predicted_s, measured_s = getattr(now, f"predicted_{action}_s"), getattr(now, f"measured_{action}_s")
            if measured_s > 0:
                self._error.set(abs(predicted_s - measured_s) / measured_s, tags={"action": action})
        self._degraded.set(float(now.guarded), tags={"part": "preemption"})
        self._headroom.set(now.headroom_blocks)
        used, retained = now.num_used_host_slots, now.num_retained_host_slots
        for state, num in (("used", used), ("retained", retained), ("free", now.num_host_slots - used - retained)):
            self._host_slots.set(num, tags={"state": state})
