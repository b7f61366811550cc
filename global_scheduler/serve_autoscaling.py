"""Serve's autoscaling policy for the replicas: turns what Serve knows into what the policy is asked with (shell).

Rules:
- It runs in the controller's event loop, ten times a second: it looks once in `LOOK_INTERVAL_S`, calls nobody, and never
  raises. Whatever goes wrong is logged, shown as degraded, and the number of replicas stays.
- Delays, steps and cool-downs are the policy's own (`global_scheduler.autoscaling`); Serve's are set to nothing
  (`cluster.app`). Serve's bounds hold besides, those of its `target_capacity` among them.
- Replicas' clocks are not compared with the controller's: a report is as old as the replica said, and older by the time
  since the controller first saw it.
- Serve imports this class by its path and takes it with it by value: nothing at module level but names.

Source: Ray 2.60 `serve/config.py` (`AutoscalingContext`, `AutoscalingPolicy`), `serve/_private/autoscaling_state.py`
(`get_decision_num_replicas`, `_get_raw_custom_metrics`), `serve/autoscaling_policy.py` (`_apply_autoscaling_config`).
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from ray.serve.config import AutoscalingContext

from cost_service.serve_metrics import degraded_gauge
from cost_service.service_messages import AUTOSCALING_STATS, AutoscalingStats
from global_scheduler.autoscaling import AutoscalerSettings, AutoscalerState, Observed, decide

logger = logging.getLogger("ray.serve")

LOOK_INTERVAL_S = 1.0
STATE = "adaptivellm"
"""Under which the policy's state lies beside Serve's own."""


class KvAutoscaler:
    """`policy_function: global_scheduler.serve_autoscaling.KvAutoscaler`; `policy_kwargs` are `AutoscalerSettings`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = AutoscalerSettings(**settings)
        self._looked_s: float | None = None
        self._why = ""
        self._heard: dict[str, tuple[float, float]] = {}
        """By replica: the time that its last report bears, and when that was first seen."""

        self._degraded = degraded_gauge("autoscaling")
        self._say_degraded(False)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there are to be, and what is to be remembered."""
        now_s = time.monotonic()
        kept = {STATE: context.policy_state[STATE]} if STATE in context.policy_state else {}
        if self._looked_s is not None and now_s - self._looked_s < LOOK_INTERVAL_S:
            return context.target_num_replicas, kept
        self._looked_s = now_s
        try:
            return self._decide(context, now_s)
        except Exception:
            logger.exception(
                "Autoscaling of %s failed; its replicas stay as many as they are.", context.deployment_name
            )
            self._say_degraded(True)
            return context.target_num_replicas, kept

    def _decide(self, context: AutoscalingContext, now_s: float) -> tuple[int, dict[str, Any]]:
        settings, remembered = self._settings, context.policy_state.get(STATE)
        state = AutoscalerState(**remembered) if remembered else AutoscalerState.begin(now_s, settings)
        seen = self._observe(context, now_s)
        num_running = context.current_num_replicas
        decision, state = decide(
            state, list(seen.values()), num_running=num_running, num_target=context.target_num_replicas,
            settings=settings, now_s=now_s,
        )  # fmt: skip
        num_heard = sum(not one.is_silent(settings.max_report_age_s) for one in seen.values())
        self._say_degraded(num_heard < num_running)
        if decision.num_replicas != context.target_num_replicas:
            logger.info("Autoscaling of %s: %s", context.deployment_name, decision.why)
        elif decision.why != self._why:
            logger.debug("Autoscaling of %s: %s", context.deployment_name, decision.why)
        self._why = decision.why
        return decision.num_replicas, {STATE: state.to_mapping()}

    def _observe(self, context: AutoscalingContext, now_s: float) -> dict[str, Observed]:
        """What each running replica has reported last; those that have not are left out."""
        raw = context.raw_metrics or {}
        seen: dict[str, Observed] = {}
        for replica in context.running_replicas:
            series = {name: of_replica[replica] for name, of_replica in raw.items() if of_replica.get(replica)}
            stats = AutoscalingStats.from_numbers({name: points[-1].value for name, points in series.items()})
            if stats is None:
                continue
            told_s = max(points[-1].timestamp for points in series.values())
            name = replica.unique_id
            if name not in self._heard or self._heard[name][0] != told_s:
                self._heard[name] = (told_s, now_s)
            age_s = stats.age_s + now_s - self._heard[name][1]
            seen[name] = Observed(
                stats=msgspec.structs.replace(stats, age_s=age_s),
                preemptions_per_s=rise_per_s(series[AUTOSCALING_STATS + "preemptions"]),
            )
        self._heard = {name: heard for name, heard in self._heard.items() if name in seen}
        return seen

    def _say_degraded(self, silent: bool) -> None:
        self._degraded.set(float(silent), tags={"part": "autoscaling"})


def rise_per_s(points: Sequence[Any]) -> float:
    """How fast a total rises over a series of values with timestamps; 0 where it began anew, or there is one value alone."""
    rise, seconds = points[-1].value - points[0].value, points[-1].timestamp - points[0].timestamp
    return max(0.0, rise / seconds) if seconds > 0.0 else 0.0
