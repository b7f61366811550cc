"""Ray metrics from the list of all metrics (shell around `cost_service.metrics`).

Rules:
- Ray's exporter forgets a gauge that was not set in its last interval, although it still is what it was. Gauges here
  remember, and a thread of each actor's process says them again every `REFRESH_S`; to set one costs a dictionary's entry.
- A counter is there from the start, at zero, for all values of its labels that are known.
- A process that is no actor (a command's) exports no gauges.

Source: Ray 2.60 `_private/telemetry/open_telemetry_metric_recorder.py` (how long gauges live), `util/metrics.py`.
"""

import threading
import time
from collections.abc import Callable, Mapping
from weakref import WeakSet

import ray
from ray.util.metrics import Counter, Gauge

from cost_service.metrics import DEGRADED, Metric, MetricKind

REFRESH_S = 2.0
"""A fraction of the 10 s in which Ray exports."""

FOR_EVER = float("inf")


class LiveCounter:
    """A counter that is there from the start."""

    def __init__(self, metric: Metric, **fixed: str) -> None:
        """Export zeros.

        Args:
            fixed: Labels that have one value in this process.
        """
        assert metric.kind is MetricKind.COUNTER, metric.name
        self._counter = Counter(metric.name, description=metric.description, tag_keys=tuple(metric.labels))
        self._fixed = fixed
        for tags in metric.known_labels(fixed):
            self._counter._record(0.0, tags=tags)  # `inc` refuses 0

    def inc(self, amount: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Count what is above 0."""
        if amount > 0.0:
            self._counter.inc(amount, tags={**self._fixed, **(tags or {})})


class LiveGauge:
    """A gauge whose values stay until they are set again."""

    def __init__(self, metric: Metric, *, keep_s: float = FOR_EVER, **fixed: str) -> None:
        """Begin with no value.

        Args:
            keep_s: Values that were not set for so many seconds are forgotten.
            fixed: Labels that have one value in this process.
        """
        assert metric.kind is MetricKind.GAUGE, metric.name
        self._gauge = Gauge(metric.name, description=metric.description, tag_keys=tuple(metric.labels))
        self._labels, self._fixed, self._keep_s = tuple(metric.labels), fixed, keep_s
        self._values: dict[tuple[str, ...], tuple[float | Callable[[], float], float]] = {}
        _say_again(self)

    def set(self, value: float | Callable[[], float], tags: Mapping[str, str] | None = None) -> None:
        """Let it be a value from now on, or what a function returns whenever it is asked (in another thread)."""
        self._values[self._key(tags)] = (value, time.monotonic())

    def replace(self, label: str, values: Mapping[str, float]) -> None:
        """Let it have these values by one label, and no others."""
        now_s = time.monotonic()
        self._values = {self._key({label: name}): (value, now_s) for name, value in values.items()}

    def set_alone(self, value: float, tags: Mapping[str, str]) -> None:
        """Let it have this one value and no other."""
        self._values = {self._key(tags): (value, time.monotonic())}

    def publish(self) -> None:
        """Say all values to Ray."""
        now_s = time.monotonic()
        for key, (value, set_s) in list(self._values.items()):
            if now_s - set_s > self._keep_s:
                self._values.pop(key, None)
            else:
                self._gauge.set(value() if callable(value) else value, tags=dict(zip(self._labels, key, strict=True)))

    def _key(self, tags: Mapping[str, str] | None) -> tuple[str, ...]:
        given = {**self._fixed, **(tags or {})}
        return tuple(given[name] for name in self._labels)


def degraded_gauge(*parts: str) -> LiveGauge:
    """1 while a part is not itself, by its name in the tag `part`; these parts are themselves from the start."""
    gauge = LiveGauge(DEGRADED)
    for part in parts:
        gauge.set(0.0, tags={"part": part})
    return gauge


_gauges: WeakSet[LiveGauge] = WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def _say_again(gauge: LiveGauge) -> None:
    global _thread
    with _lock:
        _gauges.add(gauge)
        if _thread is None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            _thread = threading.Thread(target=_publish_for_ever, daemon=True, name="metrics")
            _thread.start()


def _publish_for_ever() -> None:
    while True:
        time.sleep(REFRESH_S)
        with _lock:
            gauges = list(_gauges)
        for gauge in gauges:
            gauge.publish()
