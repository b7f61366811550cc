"""The do-no-harm guard: when adaptive preemption must give way to vLLM's own behaviour (its victim, recomputed).

A sample is log(measured / predicted seconds) of one preemption, so that twice and half are equally wrong.
- Times below `floor_s` count as `floor_s`: what a recomputation took is a difference of step times and may be negative. So
  do times below `harmless_s` of a sample: a swap that took 3 ms instead of 1 ms where a recomputation takes 10 ms was no
  mistake. A measurement that is not finite is counted, not used.
- A sample is clipped at three trip limits: more than a third of the window's weight must be wrong to trip the guard.

What counts as wrong, with m the mean of an action's last samples:
- Prices are only compared with each other: an error that both actions share changes no choice, and some of it always is
  shared (the lower price wins, hence the lucky error). What spoils choices is the distance |m_swap - m_recompute|.
- A shared error counts half: a model that is wrong by the ratio squared is none, and clipping would hide the distance.
- While only one action has `min_samples` it counts alone, and only if it took longer than predicted: an action that is
  better than its price was not chosen by mistake.

How modes change:
- The guard trips above log(trip_ratio) and returns below log(return_ratio). The action to blame starts over when it trips,
  for its old samples say nothing about a recovery: `min_samples` new ones are needed. Recomputations go on in stock mode
  and bring theirs; swaps come from probes, one in `probe_every` preemptions.
- Throughput trips it too: an adaptive window against stock windows of about the same load, all under pressure. The guard
  never asks for stock windows in order to compare. Nothing shadows throughput: a return is a new try, judged again.
- It judges prices: with other prices (`start_over`) old errors say nothing, and a trip for their sake ends.
- It returns `hold_s` after the trip at the earliest. A relapse within `cooldown_s` of a return doubles that time.
- The same calls give the same answers; time is a parameter and never runs backwards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from replicas.preemption import Action

CLIP_LIMITS = 3.0
"""Where a sample is clipped, in multiples of log(trip_ratio)."""

BASELINE_WINDOWS = 4
"""Stock windows that the baseline of throughput remembers."""

LOAD_TOLERANCE = 0.2
"""Windows are comparable if their numbers of running requests differ by no more than this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """When the guard trips and returns; a setting out of its range is a `ValueError`."""

    trip_ratio: float = 3.0
    return_ratio: float = 2.0
    min_samples: int = 8
    """Samples of an action before its mean counts."""

    window_samples: int = 16
    """Samples that an action's mean remembers."""

    floor_s: float = 1e-3
    """Shortest time that is told from nothing."""

    probe_every: int = 20
    window_s: float = 10.0
    throughput_floor: float = 0.8
    """Share of the stock throughput that an adaptive window must reach."""

    hold_s: float = 30.0
    max_hold_s: float = 3600.0
    cooldown_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 < self.return_ratio < self.trip_ratio < math.inf:
            raise ValueError("return_ratio must be above 1 and below trip_ratio, which must be finite.")
        if not 1 <= self.min_samples <= self.window_samples:
            raise ValueError("min_samples must be at least 1 and at most window_samples.")
        if self.probe_every < 1:
            raise ValueError("probe_every must be at least 1.")
        if not 0 <= self.throughput_floor < 1:
            raise ValueError("throughput_floor must be at least 0 and below 1; 0 turns the throughput watch off.")
        for name in ("floor_s", "window_s", "hold_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite.")
        if not self.hold_s <= self.max_hold_s < math.inf:
            raise ValueError("max_hold_s must be at least hold_s and finite.")
        if not 0 <= self.cooldown_s < math.inf:
            raise ValueError("cooldown_s must be finite and not negative; 0 never lengthens the hold.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardState:
    """The guard as gauges show it."""

    active: bool
    """Whether stock behaviour is in force."""

    reason: str | None
    blamed: Action | None
    """Action whose predictions must recover; None if throughput tripped the guard, or nothing did."""

    since_s: float | None
    """When the present mode began; None: it never changed."""

    hold_s: float
    """How long the last trip lasts at least."""

    ratios: Mapping[Action, float]
    """Measured / predicted seconds (geometric mean) of each action that has samples."""

    num_samples: Mapping[Action, int]
    """Samples since the action last started over."""

    num_unusable: int
    """Measurements that were not finite."""


class Guard:
    """Compares predicted with measured costs, and throughput with stock throughput; see the rules above."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self._trip_limit, self._return_limit = math.log(settings.trip_ratio), math.log(settings.return_ratio)
        self._clip = CLIP_LIMITS * self._trip_limit
        self._errors = {action: _RunningMean(settings.window_samples) for action in Action}
        self._watch = _ThroughputWatch(settings)
        self._now_s = -math.inf
        self._since_s = -math.inf
        self._hold_s = settings.hold_s
        self._reason: str | None = None
        self._blamed: Action | None = None
        self._num_since_probe = 0
        self._num_unusable = 0

    @property
    def active(self) -> bool:
        """Whether stock behaviour is in force."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why, in one sentence; None while the guard is not active."""
        return self._reason

    def observe(
        self, now_s: float, action: Action, *, predicted_s: float, measured_s: float, harmless_s: float = 0.0
    ) -> None:
        """Compare one predicted with its measured cost, in either mode.

        Args:
            harmless_s: Up to which time the action would have been right whatever was predicted.
        """
        assert 0 <= predicted_s < math.inf, f"{action} was predicted to take {predicted_s} s"
        self._advance(now_s)
        if not math.isfinite(measured_s):
            self._num_unusable += 1
            return
        floor_s = max(self.settings.floor_s, harmless_s)
        log_ratio = math.log(max(measured_s, floor_s)) - math.log(max(predicted_s, floor_s))
        self._errors[action].add(max(-self._clip, min(self._clip, log_ratio)))
        self._review()

    def observe_throughput(
        self, now_s: float, *, num_tokens: int, num_preemptions: int, num_running: int, adaptive: bool
    ) -> None:
        """Take one report; several make a window, and a change of `adaptive` begins a new one.

        Args:
            num_tokens: Output tokens delivered since the last report.
            num_preemptions: Preemptions since the last report; a window without any says nothing.
            num_running: Running requests now.
            adaptive: Whether adaptive decisions are in force now, probes aside.
        """
        assert min(num_tokens, num_preemptions, num_running) >= 0, "a negative count in a throughput report"
        self._advance(now_s)
        complaint = self._watch.add(now_s, num_tokens, num_preemptions, num_running, adaptive)
        if complaint is not None and not self.active:
            self._trip(complaint, blamed=None)
        self._review()

    def start_over(self) -> None:
        """Prices are others than those that were judged so far."""
        self._errors = {action: _RunningMean(self.settings.window_samples) for action in Action}
        if self._blamed is not None:
            self._since_s, self._reason, self._blamed = self._now_s, None, None

    def allow_probe(self) -> bool:
        """Whether the preemption at hand may be adaptive although the guard is active; ask once for each, only then."""
        assert self.active, "there is nothing to probe while the guard is not active"
        self._num_since_probe = (self._num_since_probe + 1) % self.settings.probe_every
        return self._num_since_probe == 0

    def state(self) -> GuardState:
        """Return what gauges show."""
        return GuardState(
            active=self.active,
            reason=self._reason,
            blamed=self._blamed,
            since_s=self._since_s if math.isfinite(self._since_s) else None,
            hold_s=self._hold_s,
            ratios={action: math.exp(error.mean) for action, error in self._errors.items() if error.num_samples},
            num_samples={action: error.num_samples for action, error in self._errors.items()},
            num_unusable=self._num_unusable,
        )

    def check(self) -> None:
        """Assert that mode, reason and errors agree and every counter is in its range."""
        for action, error in self._errors.items():
            assert abs(error.mean) <= self._clip + 1e-9, f"the mean of {action} is {error.mean}, beyond {self._clip}"
        assert self._num_since_probe in range(self.settings.probe_every), f"no probe for {self._num_since_probe}"
        assert self.settings.hold_s <= self._hold_s <= self.settings.max_hold_s, f"the hold is {self._hold_s} s"
        assert self._since_s <= self._now_s, "the mode began in the future"
        if self.active:
            assert math.isfinite(self._since_s), "active without a beginning"
        else:
            assert self._blamed is None, f"{self._blamed} is blamed for nothing"
            assert self._error() <= self._trip_limit, "wrong predictions, and the guard is not active"

    def _advance(self, now_s: float) -> None:
        assert now_s >= self._now_s, f"time ran backwards from {self._now_s} to {now_s} s"
        self._now_s = now_s

    def _known(self) -> list[Action]:
        return [action for action, error in self._errors.items() if error.num_samples >= self.settings.min_samples]

    def _error(self) -> float:
        """How wrong choices between the actions may be, as the log of a factor."""
        means = [self._errors[action].mean for action in self._known()]
        if len(means) < 2:
            return max([0.0, *means])
        return max(max(means) - min(means), max(map(abs, means)) / 2)

    def _review(self) -> None:
        error = self._error()
        if self.active:
            recovered = self._blamed is None or self._blamed in self._known()
            held = self._now_s - self._since_s >= self._hold_s
            if recovered and held and error < self._return_limit:
                self._since_s, self._reason, self._blamed = self._now_s, None, None
        elif error > self._trip_limit:
            means = {action: self._errors[action].mean for action in self._known()}
            told = " and ".join(f"{action} takes {math.exp(mean):.2g} times" for action, mean in means.items())
            self._trip(f"{told} as long as predicted.", blamed=max(means, key=lambda action: abs(means[action])))

    def _trip(self, reason: str, *, blamed: Action | None) -> None:
        assert not self.active, "an active guard tripped"
        relapsed = self._now_s - self._since_s < self.settings.cooldown_s
        self._hold_s = min(2 * self._hold_s, self.settings.max_hold_s) if relapsed else self.settings.hold_s
        self._since_s, self._reason, self._blamed = self._now_s, reason, blamed
        self._num_since_probe = 0
        if blamed is not None:
            self._errors[blamed] = _RunningMean(self.settings.window_samples)


class _RunningMean:
    """A mean that forgets: plain over its first `window` samples, exponential from there on."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.num_samples = 0
        self.mean = 0.0

    def add(self, value: float) -> None:
        self.num_samples += 1
        self.mean += (value - self.mean) / min(self.num_samples, self.window)


@dataclass(slots=True)
class _Window:
    """Reports of one mode that follow each other."""

    start_s: float
    adaptive: bool
    num_tokens: int = 0
    num_preemptions: int = 0
    running: float = 0.0
    num_reports: int = 0


class _ThroughputWatch:
    """Makes windows of reports, and compares adaptive ones with the mean of the last stock ones."""

    def __init__(self, settings: GuardSettings) -> None:
        self._settings = settings
        self._window: _Window | None = None
        self._forget()

    def add(self, now_s: float, num_tokens: int, num_preemptions: int, num_running: int, adaptive: bool) -> str | None:
        """Take one report; return a complaint when it ends an adaptive window that is too slow."""
        window = self._window
        if window is None or window.adaptive != adaptive:
            self._window = _Window(now_s, adaptive)  # this report's tokens are from before: another mode, or unknown
            return None
        window.num_tokens += num_tokens
        window.num_preemptions += num_preemptions
        window.running += num_running
        window.num_reports += 1
        elapsed_s = now_s - window.start_s
        if elapsed_s < self._settings.window_s:
            return None
        self._window = _Window(now_s, adaptive)
        if window.num_preemptions == 0 or elapsed_s > 2 * self._settings.window_s:
            return None  # no pressure, or a gap between reports: the engine was idle
        return self._judge(window.num_tokens / elapsed_s, window.running / window.num_reports, adaptive)

    def _judge(self, tokens_per_s: float, num_running: float, adaptive: bool) -> str | None:
        baseline, load = self._tokens_per_s.mean, self._num_running.mean  # both 0 before the first stock window
        comparable = abs(num_running - load) <= LOAD_TOLERANCE * load
        if not adaptive:
            if not comparable:
                self._forget()
            self._tokens_per_s.add(tokens_per_s)
            self._num_running.add(num_running)
        elif comparable and tokens_per_s < self._settings.throughput_floor * baseline:
            return f"{tokens_per_s:.0f} tokens/s are delivered under pressure; stock behaviour gave {baseline:.0f}."
        return None

    def _forget(self) -> None:
        self._tokens_per_s, self._num_running = _RunningMean(BASELINE_WINDOWS), _RunningMean(BASELINE_WINDOWS)
