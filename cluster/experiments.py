"""Experiments of the fairness literature by name: `synthetic:experiment=NAME`.

Rates, lengths and durations are those of the VTC artifact (Sheng et al., "Fairness in Serving Large Language Models", 2024;
`fair_bench/exp_suite.py`), which ran them with Llama-2-7B on an A10G; `--rate-scale` and `--length-scale` fit them to other
machines. Arrivals are a steady beat unless the name says Poisson. `real` is made up like the artifact's own trace, which is
lost: its mean lengths, their maximum, its rate and number of tenants.
"""

from dataclasses import replace

from cluster.synthetic import Stream

FIXED_LENGTHS = {"spread": 0.0, "prompt_mean": 256, "prompt_max": 256, "output_mean": 256, "output_max": 256}
STEADY = Stream(cv=0.0, duration=600.0, **FIXED_LENGTHS)  # type: ignore[arg-type]
MINUTES = {"on": 60.0, "off": 60.0}


def _tenants(*rates: float, duration: float = 600.0) -> tuple[Stream, ...]:
    """One steady tenant per rate."""
    return tuple(
        replace(STEADY, tenant=f"tenant-{number}", rate=rate, duration=duration) for number, rate in enumerate(rates)
    )


def _one_pauses(*rates: float, duration: float = 600.0) -> tuple[Stream, ...]:
    """The same, the first of them on for a minute and off for a minute."""
    first, *others = _tenants(*rates, duration=duration)
    return (replace(first, **MINUTES), *others)  # type: ignore[arg-type]


def _poisson(stream: Stream, prompt: int, output: int) -> Stream:
    return replace(stream, cv=1.0, prompt_mean=prompt, prompt_max=prompt, output_mean=output, output_max=output)


def _any_length(stream: Stream) -> Stream:
    return replace(
        stream, cv=1.0, lengths="uniform", prompt_min=16, prompt_max=512, output_min=16, output_max=512
    )  # fmt: skip


def _later(streams: tuple[Stream, ...], start: float) -> tuple[Stream, ...]:
    return tuple(replace(stream, start=start) for stream in streams)


_MANY, _MIXED = _tenants(8.0, 1.5), _tenants(0.5, 0.2)

EXPERIMENTS: dict[str, tuple[Stream, ...]] = {
    "overload": _tenants(1.5, 3.0, duration=360.0),
    "overload-multi": _tenants(*[0.4] * 3, *[0.6] * 5, duration=360.0),
    "overload-weighted": tuple(
        replace(stream, weight=weight)
        for weight, stream in enumerate(_tenants(0.8, 0.8, 1.2, 1.6, duration=360.0), start=1)
    ),
    "proportional": _tenants(0.25, 0.5, 1.5),
    "on_off_less": _one_pauses(0.5, 2.0),
    "on_off_overload": _one_pauses(2.0, 3.0),
    "poisson_on_off_overload": tuple(_any_length(stream) for stream in _one_pauses(0.5, 2.0)),
    "poisson_short_long": (_poisson(_MANY[0], 64, 64), _poisson(_MANY[1], 256, 256)),
    "poisson_short_long_2": (_poisson(_MANY[0], 512, 32), _poisson(_MANY[1], 32, 512)),
    "increase": (_MIXED[0], replace(_MIXED[1], rate_end=2.0)),
    "dist_shift": (
        *_one_pauses(0.5, 2.0, duration=300.0),
        *_later(_tenants(1.0, 1.0, duration=300.0), 300.0),
        *_later(_tenants(0.5, 1.5, duration=300.0), 600.0),
    ),
    "real": (
        Stream(
            tenants=27, zipf=1.0, rate=3.5, duration=600.0, spread=1.0,
            prompt_mean=136.0, prompt_max=1024, output_mean=256.0, output_max=1024,
        ),
    ),
}  # fmt: skip


def experiment(name: str) -> tuple[Stream, ...]:
    """Streams of an experiment.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"Workload key experiment must be one of {', '.join(EXPERIMENTS)}.")
    return EXPERIMENTS[name]
