"""The autoscaler of a simulated cluster: the product's policy (`global_scheduler.autoscaling`), asked as Serve asks it.

Rules:
- It looks every `LOOK_INTERVAL_S` at what replicas reported last, which they do every `REPORT_INTERVAL_S`, those that have
  come up lately included once they have reported. Replicas that are scaled away are seen no more.
- A new replica takes requests `startup_s` after it was wanted; one that is scaled away when it has served what it has.
- Every replica that is there costs its time, from the moment that it is wanted until it is gone.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_replica import FIRST_COME, Replica
from cost_service.service_messages import AutoscalingStats
from global_scheduler.autoscaling import AutoscalerSettings, AutoscalerState, Observed, decide

LOOK_INTERVAL_S = 1.0
REPORT_INTERVAL_S = 2.0
RATE_WINDOW_S = 30.0
"""As Serve keeps reports, for preemptions per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """How a cluster is scaled."""

    settings: AutoscalerSettings
    startup_s: float = 60.0
    """From the wish for a replica to its first request."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.startup_s < math.inf:
            raise ValueError(f"--startup-s must be finite and not negative: it is {self.startup_s}.")


@dataclass(slots=True)
class _Told:
    """What one life of a replica has reported."""

    epoch: int
    last: AutoscalingStats
    at_s: float
    preemptions: list[tuple[float, int]] = field(default_factory=list)


class SimulatedAutoscaler:
    """One run's autoscaler."""

    interval_s = LOOK_INTERVAL_S

    def __init__(self, autoscaling: Autoscaling) -> None:
        self.settings, self.startup_s = autoscaling.settings, autoscaling.startup_s
        self.num_wanted = autoscaling.settings.min_replicas
        self.changes: list[tuple[float, int, str]] = []
        """When, how many from then on, and why."""

        self.times: list[tuple[float, int, int, int]] = []
        """Whenever one of them changed: when, and how many replicas are wanted, take requests, and are there."""

        self._state = AutoscalerState.begin(0.0, autoscaling.settings)
        self._told: dict[int, _Told] = {}

    def decide(self, replicas: Sequence[Replica], now_s: float) -> int:
        """Return how many replicas there are to be from now on."""
        running = [replica for replica in replicas if replica.up and not replica.draining]
        self._told = {
            replica.number: told
            for replica in running
            if (told := self._told.get(replica.number)) is not None and told.epoch == replica.epoch
        }
        for replica in running:
            told = self._told.get(replica.number)
            if told is None or now_s - told.at_s >= REPORT_INTERVAL_S:
                self._told[replica.number] = _report(replica, told, now_s)
        seen = [_observed(told, now_s) for told in self._told.values()]
        decision, self._state = decide(
            self._state, seen, num_running=len(running), num_target=self.num_wanted, settings=self.settings,
            now_s=now_s,
        )  # fmt: skip
        if decision.num_replicas != self.num_wanted:
            self.num_wanted = decision.num_replicas
            self.changes.append((now_s, self.num_wanted, decision.why))
        return self.num_wanted

    def note(self, replicas: Sequence[Replica], now_s: float) -> None:
        """Write down how many replicas there are, after a decision was carried out."""
        taking = sum(replica.up and not replica.draining for replica in replicas)
        there = sum(replica.up or not replica.draining for replica in replicas)
        if not self.times or self.times[-1][1:] != (self.num_wanted, taking, there):
            self.times.append((now_s, self.num_wanted, taking, there))

    def replica_seconds(self, end_s: float) -> float:
        """The time of all replicas that were there, together."""
        ends_s = [at_s for at_s, *_ in self.times[1:]] + [end_s]
        return sum(
            there * max(0.0, to_s - at_s) for (at_s, _, _, there), to_s in zip(self.times, ends_s, strict=True)
        )  # fmt: skip


def _report(replica: Replica, before: _Told | None, now_s: float) -> _Told:
    """What a replica says now."""
    stats = stats_of(replica.engine)
    since = [each for each in (before.preemptions if before else []) if each[0] >= now_s - RATE_WINDOW_S]
    return _Told(replica.epoch, stats, now_s, [*since, (now_s, stats.preemptions)])


def stats_of(engine: SimulatedEngine) -> AutoscalingStats:
    """What a simulated engine reports, as `replicas.messages.EngineTotals.autoscaling`."""
    assert engine.fair is not None, "an engine whose order is first come predicts nothing"
    num_running = len(engine.running)
    num_waiting = engine.num_requests - num_running
    at_once = num_running or min(engine.settings.max_num_seqs, num_waiting)
    return AutoscalingStats(
        num_running=num_running, num_waiting=num_waiting, num_blocks=engine.settings.num_blocks,
        num_free_blocks=engine.blocks.num_free, max_num_seqs=engine.settings.max_num_seqs,
        queued_s=engine.fair.core.queued_s(at_once), preemptions=engine.num_preemptions,
    )  # fmt: skip


def _observed(told: _Told, now_s: float) -> Observed:
    (from_s, num_before), (to_s, num) = told.preemptions[0], told.preemptions[-1]
    rate = (num - num_before) / (to_s - from_s) if to_s > from_s else 0.0
    return Observed(stats=msgspec.structs.replace(told.last, age_s=now_s - told.at_s), preemptions_per_s=rate)


def parse_autoscaling(text: str, *, startup_s: float) -> Autoscaling:
    """Read `MIN:MAX[,SETTING=VALUE...]`.

    Raises:
        ValueError: It is none; one sentence with the mend.
    """
    bounds, *changes = text.split(",")
    least, _, most = bounds.partition(":")
    if not (least.isdecimal() and most.isdecimal()):
        raise ValueError(f"--autoscale must begin with MIN:MAX, such as 2:8: it is {text!r}.")
    kinds = {each.name: each.type for each in fields(AutoscalerSettings)}
    values: dict[str, Any] = {"min_replicas": int(least), "max_replicas": int(most)}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds or name in values:
            known = ", ".join(name for name in kinds if name not in ("min_replicas", "max_replicas"))
            raise ValueError(f"--autoscale has {name!r}: each of {known} may be given once.")
        try:
            values[name] = int(value) if kinds[name] is int else float(value)
        except ValueError:
            raise ValueError(f"--autoscale must have a number for {name}: it is {value!r}.") from None
    return Autoscaling(settings=AutoscalerSettings(**values), startup_s=startup_s)


def check_autoscaling(options: argparse.Namespace, admissions: Sequence[str]) -> None:
    """Refuse what cannot be scaled by the load.

    Raises:
        ValueError: One sentence with the mend.
    """
    if options.autoscale is None:
        return
    if FIRST_COME in admissions:
        raise ValueError(f"--autoscale needs predictions of who waits: leave {FIRST_COME} out of --admission.")
    if options.plan is not None:
        raise ValueError("--autoscale and --plan cannot both say how many replicas there are: leave one out.")


def as_report(scaler: SimulatedAutoscaler, end_s: float, tokens: int) -> Mapping[str, Any]:
    """What a report says of scaling: plain values."""
    seconds = scaler.replica_seconds(end_s)
    return {
        "replica_seconds": seconds,
        "mean_replicas": seconds / end_s if end_s else 0.0,
        "output_tokens_per_replica_second": tokens / seconds if seconds else 0.0,
        "changes": [{"at_s": at_s, "replicas": num, "why": why} for at_s, num, why in scaler.changes],
        "over_time": [
            {"at_s": at_s, "wanted": wanted, "taking": taking, "there": there}
            for at_s, wanted, taking, there in scaler.times
        ],
    }


def scaling_lines(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Render for a terminal what arms say of scaling; nothing where none does."""
    lines: list[str] = []
    for name, arm in arms.items():
        if (scaling := arm.get("scaling")) is not None:
            lines += ["", f"replicas of {name}: {scaling['mean_replicas']:.2f} in the mean"]
            lines += [f"{each['at_s']:>10.0f} s  {each['why']}" for each in scaling["changes"]]
    return lines
