"""The experiments on fairness across replicas, as values: who sends what, where it may go, and what goes wrong meanwhile.

Rates are in requests of 256 + 256 tokens that one replica serves in a second, for all replicas of an experiment together
with their number: a rate of 1 is what they can do. Those of the literature (`cluster.experiments`) are divided by the
capacity of the machine that they were run on, so that `overload` asks 2.6 times too much of any machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.disturbances import Disturbances
from cluster.experiments import EXPERIMENTS, STEADY
from cluster.simulated_replica import FIRST_COME, LOCAL
from cluster.simulated_share import ShareSettings
from cluster.synthetic import Stream
from cluster.tenant_routing import Places
from replicas.fair_queue import Admission

REFERENCE_CAPACITY = 1.74
"""Requests of 256 + 256 tokens a second, of an A10G with Llama-2-7B (arXiv:2401.00588)."""

LITERATURE_TIME = 0.3
"""Part of the suites' time that they take here."""

FAIR = Admission.FAIR.value
TWO, THREE = (FIRST_COME, FAIR), (FIRST_COME, LOCAL, FAIR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One load on one cluster, under several orders of admission."""

    name: str
    streams: tuple[Stream, ...]
    """Rates as the module says."""

    num_replicas: int = 2
    arms: tuple[str, ...] = TWO
    breaks: tuple[str, ...] = ()
    """Arms that this experiment is meant to show as unfair."""

    pins: Mapping[str, Places] = field(default_factory=dict)
    num_users: Mapping[str, int] = field(default_factory=dict)
    share: ShareSettings = field(default_factory=ShareSettings)
    disturbances: Disturbances = field(default_factory=Disturbances)
    constant_step_s: float | None = None
    """What every step takes, whatever is in it; None: as on the device."""

    absolute: bool = False
    """Whether rates are requests a second instead."""

    at_most_s: float = 600.0

    @property
    def until_s(self) -> float:
        """When it ends: with the last arrivals."""
        return min(self.at_most_s, max(stream.start + (stream.duration or 0.0) for stream in self.streams))


def in_time(experiment: Experiment, factor: float) -> Experiment:
    """The same in a part of the time; what is sent in a second stays, and how often replicas report."""
    share, disturbances = experiment.share, experiment.disturbances
    if share.away is not None:
        share = replace(share, away=(share.away[0] * factor, share.away[1] * factor))
    disturbances = replace(
        disturbances, restart_s=disturbances.restart_s * factor,
        crashes=[(at_s * factor, number) for at_s, number in disturbances.crashes],
        scale=[(at_s * factor, num) for at_s, num in disturbances.scale],
    )  # fmt: skip
    streams = tuple(_in_time(stream, factor) for stream in experiment.streams)
    return replace(experiment, streams=streams, share=share, disturbances=disturbances)


def _in_time(stream: Stream, factor: float) -> Stream:
    times = {"start": stream.start * factor, "duration": (stream.duration or 0.0) * factor}
    if stream.on is not None:
        times["on"] = stream.on * factor
        times["off"] = (stream.on if stream.off is None else stream.off) * factor
    return replace(stream, **times)  # type: ignore[arg-type]


def _of_literature(name: str) -> Experiment:
    streams = tuple(
        replace(
            _in_time(stream, LITERATURE_TIME), rate=stream.rate / REFERENCE_CAPACITY,
            rate_end=None if stream.rate_end is None else stream.rate_end / REFERENCE_CAPACITY,
        )
        for stream in EXPERIMENTS[name]
    )  # fmt: skip
    return Experiment(name=name, streams=streams, breaks=() if name in FAIR_ANYHOW else (FIRST_COME,))


FAIR_ANYHOW = ("overload-multi", "overload-weighted")
"""Suites under which first come stays within the bound in that time."""

DURATION_S = 120.0


def _tenant(name: str, rate: float, *, weight: float = 1.0, **changes: float) -> Stream:
    return replace(STEADY, tenant=name, rate=rate, weight=weight, duration=DURATION_S, **changes)  # type: ignore[arg-type]


FLOOD = (_tenant("f", 1.72), _tenant("g", 0.86))
"""2.6 times too much, 2 : 1."""

TWICE_FLOOD = tuple(replace(stream, rate=2.0 * stream.rate) for stream in FLOOD)
"""As much for twice as many replicas: each asks for more than half of what there is at any time, also while some drain."""

HALF: Mapping[str, Places] = {"f": dict.fromkeys(range(4), 1.0), "g": dict.fromkeys(range(2), 1.0)}
"""f's sessions are on all of four replicas, g's on two."""

OPPOSITE: Mapping[str, Places] = {"f": {0: 4.0, 1: 1.0}, "g": {0: 1.0, 1: 4.0}}
"""Two ingresses: each sends four of five requests to its own replica."""


def _pinned(name: str, **changes: object) -> Experiment:
    plain = Experiment(name=name, streams=FLOOD, num_replicas=4, pins=HALF, arms=(FAIR,))
    return replace(plain, **changes)  # type: ignore[arg-type]


ACROSS = (
    Experiment(name="balanced, 2 replicas", streams=FLOOD, arms=THREE, breaks=(FIRST_COME,)),
    Experiment(name="balanced, 4 replicas", streams=FLOOD, num_replicas=4, arms=THREE, breaks=(FIRST_COME,)),
    _pinned("pinned to 2 of 4", arms=THREE, breaks=(FIRST_COME, LOCAL)),
    Experiment(
        name="pinned to 1 of 4, by level", streams=(_tenant("f", 1.5), _tenant("g", 0.75), _tenant("h", 2.25)),
        num_replicas=4, pins={"f": HALF["f"], "g": {0: 1.0}, "h": HALF["f"]}, breaks=(FIRST_COME,),
    ),
    Experiment(
        name="two ingresses, 4 : 1", streams=(_tenant("f", 2.5, weight=4.0), _tenant("g", 2.5)), pins=OPPOSITE,
        arms=THREE, breaks=(FIRST_COME,),
    ),
    Experiment(
        name="two ingresses, g waits at one", streams=(_tenant("f", 4.0), _tenant("g", 0.7)), pins=OPPOSITE,
        arms=THREE, breaks=(FIRST_COME, LOCAL),
    ),
    _pinned("scheduler killed for 2 s, stored", share=ShareSettings(away=(40.0, 42.0))),
    _pinned("the same, nothing stored", share=ShareSettings(away=(40.0, 42.0), store_interval_s=None)),
    _pinned(
        "scheduler away for 30 s", share=ShareSettings(away=(40.0, 70.0)), arms=THREE, breaks=(FIRST_COME, LOCAL),
        streams=tuple(replace(stream, duration=150.0) for stream in FLOOD),
    ),
    _pinned("3 of 10 messages lost, 50 ms late", disturbances=Disturbances(report_loss=0.3, report_delay_s=0.05)),
    Experiment(
        name="replica killed, back in 30 s", streams=FLOOD, num_replicas=4, arms=TWO, breaks=(FIRST_COME,),
        disturbances=Disturbances(crashes=((40.0, 3),), restart_s=30.0),
    ),
    Experiment(
        name="2 -> 4 -> 2 replicas", streams=TWICE_FLOOD, arms=TWO, breaks=(FIRST_COME,),
        disturbances=Disturbances(scale=((30.0, 4), (70.0, 2))),
    ),
    *(_pinned(f"synchronised every {s:g} s", share=ShareSettings(interval_s=s)) for s in (0.05, 0.5, 2.0, 5.0, 20.0)),
    Experiment(
        name="500 tenants, few at a replica", num_replicas=4, arms=THREE, breaks=(FIRST_COME,),
        streams=(_tenant("f", 1.7), _tenant("crowd", 1.7, tenants=500, zipf=1.0)),
    ),
    Experiment(name="a tenant as 1 user", streams=(_tenant("f", 1.3), _tenant("g", 1.3)), arms=(FAIR,)),
    Experiment(
        name="a tenant as 20 users", streams=(_tenant("f", 1.3), _tenant("g", 1.3)), arms=(FAIR,), num_users={"f": 20},
    ),
)  # fmt: skip
"""Those that no suite of the literature has."""

ANY_LENGTH = Stream(
    cv=1.0, spread=0.7, prompt_mean=256.0, prompt_max=1024, output_mean=256.0, output_max=1024, duration=DURATION_S
)
LIGHT = tuple(replace(ANY_LENGTH, tenant=f"light-{number}", rate=0.6, seed=number) for number in range(3))
HEAVY = replace(ANY_LENGTH, tenant="flood", rate=16.0, seed=9)


def _light(name: str, *streams: Stream, constant_step_s: float | None = None) -> Experiment:
    flooded = len(streams) > len(LIGHT)
    return Experiment(
        name=name, streams=streams, num_replicas=4, arms=TWO if flooded else (FAIR,),
        breaks=(FIRST_COME,) if flooded else (), constant_step_s=constant_step_s,
        absolute=constant_step_s is not None,
    )  # fmt: skip


def _scaled(streams: tuple[Stream, ...]) -> tuple[Stream, ...]:
    """In parts of what four replicas can do: the flood twice that, light ones 4 % each."""
    return tuple(replace(stream, rate=2.0 if stream.tenant == "flood" else 0.04) for stream in streams)


LIGHTS = (
    _light("light alone, constant steps", *LIGHT, constant_step_s=0.03),
    _light("light beside a flood, constant steps", *LIGHT, HEAVY, constant_step_s=0.03),
    _light("light alone", *_scaled(LIGHT)),
    _light("light beside a flood", *_scaled((*LIGHT, HEAVY))),
)
"""Three tenants who ask little, beside one who asks too much: what they wait for."""

FAIRNESS_EXPERIMENTS = {
    one.name: one
    for one in (*(_of_literature(name) for name in EXPERIMENTS if name != "real"), *ACROSS, *LIGHTS)
}  # fmt: skip
