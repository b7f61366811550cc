"""How many replicas there are to be: by memory in use and predicted work that waits. Values in, an explained decision out.

What the load asks for is the largest of three numbers of replicas, rounded up:
    room     sum of fullness / target_kv_use       fullness: KV blocks in use, or seats of the batch, whichever is fuller
    queue    sum of queued_s / target_queued_s     what waits is to be served within that time by all together
    short    running + 1                           while the mean replica preempts more often than `max_preemptions_per_s`
These count all replicas that are needed, not those to add: while new ones start, the same load asks for the same number.

Rules:
1. Up when the load has asked for more during `up_delay_s`, by at most `max_step_up`; down when it has asked for less during
   `down_delay_s`, to the most that it asked for in that time, by at most `max_step_down`.
2. A cool-down after each change: nothing rises for `up_cooldown_s`, nothing falls for `down_cooldown_s`.
3. Less is asked with targets that are lower by `down_margin`: what was given up is not asked for again by the same load.
4. Nothing falls while anybody waits, nor while a replica is silent: who says nothing, or is at work and has last said
   something `max_report_age_s` ago, is taken for an average one.
5. Within `min_replicas` and `max_replicas` always, also where somebody else has set another number.
- No clock: whoever drives it says the time; one that jumps back stands still. The state is a value, passed in and out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cost_service.service_messages import AutoscalingStats


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerSettings:
    """What is aimed at, and how fast numbers may change."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_kv_use: float = 0.8
    """Share of a replica's KV blocks, or seats, that is to be in use."""

    target_queued_s: float = 10.0
    """Predicted seconds of work that may wait at a replica."""

    max_preemptions_per_s: float = 1.0
    """Of a replica; more often, memory is short whatever is in use at the moment."""

    max_step_up: int = 4
    max_step_down: int = 1
    up_delay_s: float = 5.0
    down_delay_s: float = 120.0
    up_cooldown_s: float = 30.0
    down_cooldown_s: float = 300.0
    down_margin: float = 0.25
    """Part of the targets that must be free beyond them before replicas are given up."""

    max_report_age_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("min_replicas", "max_replicas", "max_step_up", "max_step_down"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: it is {getattr(self, name)}.")
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must not be above max_replicas: it is {self.min_replicas}, above {self.max_replicas}."
            )
        for name, most in (("target_kv_use", 1.0), ("target_queued_s", math.inf)):
            if not 0.0 < getattr(self, name) <= most:
                raise ValueError(f"{name} must be above 0 and at most {most:g}: it is {getattr(self, name)}.")
        if not 0.0 <= self.down_margin < 1.0:
            raise ValueError(f"down_margin must be from 0 to below 1: it is {self.down_margin}.")
        names = ("up_delay_s", "down_delay_s", "up_cooldown_s", "down_cooldown_s", "max_report_age_s")
        for name in (*names, "max_preemptions_per_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative: it is {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One replica as its last report says."""

    stats: AutoscalingStats
    preemptions_per_s: float = 0.0

    @property
    def fullness(self) -> float:
        """Share of the KV blocks or of the seats that is taken; 0 of a replica that has not worked yet."""
        stats = self.stats
        blocks = 1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        seats = stats.num_running / stats.max_num_seqs if stats.max_num_seqs else 0.0
        return min(1.0, max(0.0, blocks, seats))

    def is_silent(self, max_age_s: float) -> bool:
        """Whether it is at work and should have said something by now."""
        return self.stats.age_s > max_age_s and self.stats.num_running + self.stats.num_waiting > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the load asks for."""

    num_replicas: int
    why: str
    """Without a number of replicas: `0.93 of memory in use, 0.8 aimed at`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerState:
    """What is remembered from one decision to the next; plain numbers."""

    now_s: float
    """Of the last decision."""

    up_from_s: float
    """When the number may rise again; so for falling below."""

    down_from_s: float
    above_since_s: float | None = None
    """Since when more has been asked for than there is to be, without a break; so for less below."""

    below_since_s: float | None = None
    most_below: int = 0
    """The most that was asked for since then."""

    @classmethod
    def begin(cls, now_s: float, settings: AutoscalerSettings) -> "AutoscalerState":
        """Nothing is known of earlier changes: there may just have been one, so that nothing falls yet."""
        return cls(now_s=now_s, up_from_s=now_s, down_from_s=now_s + settings.down_cooldown_s)

    def to_mapping(self) -> dict[str, Any]:
        """Return it as plain values, which `AutoscalerState(**mapping)` takes."""
        return asdict(self)

    def check(self) -> None:
        """Assert what always holds."""
        assert self.above_since_s is None or self.below_since_s is None, "more and less are asked for"
        for since_s in (self.above_since_s, self.below_since_s):
            assert since_s is None or since_s <= self.now_s, f"since {since_s} s, which is after {self.now_s} s"
        assert (self.below_since_s is None) == (self.most_below == 0), f"{self.most_below} replicas, at no time"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingDecision:
    """How many replicas there are to be, and why, in one sentence."""

    num_replicas: int
    why: str


def demand(
    heard: Sequence[Observed], *, num_running: int, settings: AutoscalerSettings, part: float = 1.0
) -> Demand:  # fmt: skip
    """Return what the load asks for, within the limits.

    Args:
        heard: Of the replicas that run, those that are not silent; at least one.
        num_running: All that run; silent ones are taken for average ones.
        part: Of the targets, that is aimed at.
    """
    assert 0 < len(heard) <= num_running, f"{len(heard)} of {num_running} replicas were heard"
    scale = num_running / len(heard)
    full, queued_s = scale * sum(one.fullness for one in heard), scale * sum(one.stats.queued_s for one in heard)
    preemptions = sum(one.preemptions_per_s for one in heard) / len(heard)
    room = full / (settings.target_kv_use * part)
    queue = queued_s / (settings.target_queued_s * part)
    most = max(room, queue)
    if most == queue and queue > 0.0:
        wait_s = queued_s / num_running
        why = f"{wait_s:.1f} s of predicted work wait at a replica, {settings.target_queued_s:g} s are aimed at"
    else:
        why = f"{full / num_running:.2f} of memory and seats are in use, {settings.target_kv_use:g} is aimed at"
    if preemptions > settings.max_preemptions_per_s and most <= num_running:
        most = num_running + 1
        why = f"a replica preempts {preemptions:.1f} times a second, {settings.max_preemptions_per_s:g} are borne"
    # A billionth, so that what is exactly enough is not one too few.
    num = math.ceil(min(most, settings.max_replicas) - 1e-9)
    return Demand(num_replicas=max(settings.min_replicas, num), why=why)


def decide(
    state: AutoscalerState, seen: Sequence[Observed], *, num_running: int, num_target: int,
    settings: AutoscalerSettings, now_s: float,
) -> tuple[ScalingDecision, AutoscalerState]:  # fmt: skip
    """Decide how many replicas there are to be from now on.

    Args:
        seen: What replicas that run have reported, each once; those that never have are left out.
        num_running: Replicas that run.
        num_target: As many as there are to be now, those that start among them.
        now_s: Of any clock, always the same one.
    """
    assert len(seen) <= num_running, f"{len(seen)} of {num_running} replicas have reported"
    state = replace(state, now_s=max(now_s, state.now_s))
    within = min(max(num_target, settings.min_replicas), settings.max_replicas)
    if within != num_target:
        why = f"{num_target} -> {within} replicas: {settings.min_replicas} to {settings.max_replicas} are allowed."
        return ScalingDecision(num_replicas=within, why=why), _changed(state, settings)
    heard = [one for one in seen if not one.is_silent(settings.max_report_age_s)]
    if not heard:
        return _kept(num_target, "no replica says how full it is", _forgetting(state))
    more = demand(heard, num_running=num_running, settings=settings)
    if more.num_replicas > num_target:
        return _up(state, more, num_target, settings)
    if len(heard) < num_running:
        why = f"{num_running - len(heard)} of {num_running} replicas say nothing"
        return _kept(num_target, why, _forgetting(state))
    less = demand(heard, num_running=num_running, settings=settings, part=1.0 - settings.down_margin)
    if less.num_replicas >= num_target:
        return _kept(num_target, more.why, _forgetting(state))
    return _down(state, less, num_target, settings, num_waiting=sum(one.stats.num_waiting for one in heard))


def _up(
    state: AutoscalerState, more: Demand, num_target: int, settings: AutoscalerSettings
) -> tuple[ScalingDecision, AutoscalerState]:
    """More is asked for."""
    since_s = state.now_s if state.above_since_s is None else state.above_since_s
    state = replace(state, above_since_s=since_s, below_since_s=None, most_below=0)
    asks = f"{more.num_replicas} are asked for ({more.why})"
    if (wait_s := since_s + settings.up_delay_s - state.now_s) > 0.0:
        return _kept(num_target, f"{asks}, and that must last {wait_s:.0f} s more", state)
    if (wait_s := state.up_from_s - state.now_s) > 0.0:
        return _kept(num_target, f"{asks}, and the cool-down lasts {wait_s:.0f} s more", state)
    num = min(more.num_replicas, num_target + settings.max_step_up)
    assert num_target < num <= settings.max_replicas, f"{num_target} -> {num} is no step up"
    return _change(num_target, num, more.why, state, settings)


def _down(
    state: AutoscalerState, less: Demand, num_target: int, settings: AutoscalerSettings, *, num_waiting: int
) -> tuple[ScalingDecision, AutoscalerState]:  # fmt: skip
    """Less is asked for."""
    since_s = state.now_s if state.below_since_s is None else state.below_since_s
    most = max(less.num_replicas, state.most_below)
    state = replace(state, above_since_s=None, below_since_s=since_s, most_below=most)
    asks = f"{less.num_replicas} would do ({less.why})"
    if (wait_s := since_s + settings.down_delay_s - state.now_s) > 0.0:
        return _kept(num_target, f"{asks}, and that must last {wait_s:.0f} s more", state)
    if (wait_s := state.down_from_s - state.now_s) > 0.0:
        return _kept(num_target, f"{asks}, and the cool-down lasts {wait_s:.0f} s more", state)
    if num_waiting:
        return _kept(num_target, f"{asks}, but {num_waiting} requests wait", state)
    num = max(most, num_target - settings.max_step_down)
    if num >= num_target:
        why = f"{asks}, but {most} were asked for in the last {settings.down_delay_s:g} s"
        return _kept(num_target, why, replace(state, below_since_s=state.now_s, most_below=less.num_replicas))
    assert settings.min_replicas <= num, f"{num_target} -> {num} is no step down"
    return _change(num_target, num, less.why, state, settings)


def _kept(num: int, why: str, state: AutoscalerState) -> tuple[ScalingDecision, AutoscalerState]:
    state.check()
    return ScalingDecision(num_replicas=num, why=f"{num} replicas stay: {why}."), state


def _change(
    before: int, num: int, why: str, state: AutoscalerState, settings: AutoscalerSettings
) -> tuple[ScalingDecision, AutoscalerState]:
    return ScalingDecision(num_replicas=num, why=f"{before} -> {num} replicas: {why}."), _changed(state, settings)


def _changed(state: AutoscalerState, settings: AutoscalerSettings) -> AutoscalerState:
    """The cool-down begins."""
    state = replace(
        _forgetting(state), up_from_s=state.now_s + settings.up_cooldown_s,
        down_from_s=state.now_s + settings.down_cooldown_s,
    )  # fmt: skip
    state.check()
    return state


def _forgetting(state: AutoscalerState) -> AutoscalerState:
    """Nothing is asked for, or nobody knows."""
    return replace(state, above_since_s=None, below_since_s=None, most_below=0)
