"""Goal: a source's text gives the same requests everywhere and always, within the limits that it states.

Method: sentences about single keys; random settings whose requests must stay inside them; the experiments' shapes.
"""

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.experiments import EXPERIMENTS
from cluster.prompts import FIRST_TOKEN_ID
from cluster.synthetic import Stream, Synthetic
from cost_service.traces import TraceRequest

EXAMPLE = (
    "synthetic:requests=60,rate=8,tenants=4,prompt_mean=60,prompt_max=120,output_mean=80,output_max=140,"
    "vocab=512,seed=0"
)


def made(text: str, seed: int = 0) -> list[TraceRequest]:
    return list(Synthetic.parse(f"synthetic:{text.removeprefix('synthetic:')}").requests(seed))


def test_the_example_text_says_what_the_defaults_are() -> None:
    assert made(EXAMPLE) == made("")


def test_requests_are_sorted_by_arrival_and_the_first_arrives_at_once() -> None:
    requests = made(EXAMPLE)
    assert len(requests) == 60
    arrivals_s = [request.arrival_s for request in requests]
    assert arrivals_s[0] == 0
    assert arrivals_s == sorted(arrivals_s)
    assert {request.tenant for request in requests} == {f"tenant-{number}" for number in range(4)}


def test_one_seed_gives_the_same_requests_and_another_seed_gives_others() -> None:
    assert made("seed=3") == made("seed=3") == made("seed=1", seed=2)
    assert made("seed=3") != made("seed=4")


def test_the_very_requests_of_a_seed_do_not_change_with_the_code() -> None:
    """Old result files name their workload by its text alone."""
    first, second = made("requests=2,prompt_mean=2,prompt_max=4,seed=7")
    assert first == TraceRequest(
        arrival_s=0.0, tenant="tenant-2", prompt_tokens=3, output_tokens=31, prompt_token_ids=(468, 262, 112)
    )
    assert (second.arrival_s, second.prompt_token_ids) == (pytest.approx(0.004777, abs=1e-6), (292, 66))


@pytest.mark.parametrize("rate", [0, math.inf])
def test_without_a_finite_rate_all_requests_arrive_at_once(rate: float) -> None:
    assert {request.arrival_s for request in made(f"rate={rate}")} == {0.0}


def test_the_rate_changes_arrivals_and_nothing_else_and_is_met_on_average() -> None:
    fast, slow = made("requests=2000,rate=50"), made("requests=2000,rate=25")
    gaps_s = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(fast)]
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 50, rel=0.15)  # exponential: as wide as its mean
    assert [dataclasses.replace(request, arrival_s=0.0) for request in fast] == [
        dataclasses.replace(request, arrival_s=0.0) for request in slow
    ]


def test_lengths_have_their_mean_where_the_cut_is_far_away() -> None:
    requests = made("requests=3000,prompt_max=2000,output_max=2000")
    assert statistics.fmean(request.prompt_tokens for request in requests) == pytest.approx(60, rel=0.05)
    assert statistics.fmean(request.output_tokens for request in requests) == pytest.approx(80, rel=0.05)


def test_without_spread_every_length_is_its_mean() -> None:
    for request in made("spread=0,prompt_mean=7,output_mean=140"):
        assert (request.prompt_tokens, request.output_tokens) == (7, 140)


def test_uniform_lengths_are_spread_evenly_between_their_ends() -> None:
    requests = made("requests=3000,lengths=uniform,prompt_min=16,prompt_max=512,output_max=3")
    lengths = [request.prompt_tokens for request in requests]
    assert (min(lengths), max(lengths)) == (16, 512)
    assert statistics.fmean(lengths) == pytest.approx(264, rel=0.05)
    assert set(Counter(request.output_tokens for request in requests)) == {1, 2, 3}


def test_a_skew_gives_the_first_tenants_more() -> None:
    shares = Counter(request.tenant for request in made("requests=6000,tenants=3,zipf=1"))
    assert [shares[f"tenant-{number}"] / 6000 for number in range(3)] == pytest.approx(
        [6 / 11, 3 / 11, 2 / 11], abs=0.02
    )


def test_a_later_stream_is_as_the_one_before_it_but_of_other_tenants() -> None:
    requests = made("tenants=1,rate=1,cv=0,duration=10,spread=0/rate=2/rate=4,tenant=late,start=5")
    rates = Counter(request.tenant for request in requests)
    assert rates == {"tenant-0": 10, "tenant-1": 20, "late": 40}
    assert min(one.arrival_s for one in requests if one.tenant == "late") == 5
    assert {one.prompt_tokens for one in requests} == {60}
    arrivals_s = [one.arrival_s for one in requests]
    assert arrivals_s == sorted(arrivals_s)


def test_streams_of_one_tenant_are_its_phases() -> None:
    requests = made("tenant=a,rate=1,cv=0,duration=10/tenant=a,rate=5,start=10")
    assert {one.tenant for one in requests} == {"a"}
    assert [sum(start <= one.arrival_s < start + 10 for one in requests) for start in (0, 10)] == [10, 50]


def test_equal_streams_have_chance_of_their_own() -> None:
    requests = made("tenants=1,rate=9,duration=20/rate=9")
    of = [[one.arrival_s for one in requests if one.tenant == name] for name in ("tenant-0", "tenant-1")]
    assert of[0] != of[1]


def test_a_named_stream_of_several_tenants_numbers_them() -> None:
    assert {one.tenant for one in made("tenant=team,tenants=2")} == {"team-0", "team-1"}


def test_a_source_of_any_length_is_read_as_far_as_it_is_asked_for() -> None:
    source = Synthetic.parse("synthetic:requests=999999999999,tenants=1/rate=2")
    assert len(list(islice(source.requests(), 100))) == 100


def test_weights_are_those_of_the_streams() -> None:
    source = Synthetic.parse("synthetic:tenants=2,weight=3,duration=1/weight=0.5,tenant=a,tenants=1")
    assert source.weights() == {"tenant-0": 3.0, "tenant-1": 3.0, "a": 0.5}


@given(
    requests=st.integers(1, 40),
    tenants=st.integers(1, 5),
    longest=st.integers(1, 60),
    share=st.floats(0, 1),
    spread=st.floats(0, 3),
    lengths=st.sampled_from(["lognormal", "uniform"]),
    cv=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    zipf=st.floats(0, 3),
    vocab=st.integers(FIRST_TOKEN_ID + 1, 1000),
    seed=st.integers(0, 99),
)
def test_whatever_the_settings_requests_stay_inside_them(
    requests: int, tenants: int, longest: int, share: float, spread: float, lengths: str, cv: float, zipf: float,
    vocab: int, seed: int,
) -> None:  # fmt: skip
    mean = 1 + share * (longest - 1)
    least = 1 + int(share * (longest - 1) / 2)
    stream = Stream(
        requests=requests, tenants=tenants, prompt_mean=mean, prompt_min=least, prompt_max=longest, output_mean=mean,
        output_min=least, output_max=longest, spread=spread, lengths=lengths, cv=cv, zipf=zipf, vocab=vocab, seed=seed,
    )  # fmt: skip
    generated = list(Synthetic(streams=(stream,)).requests())
    assert len(generated) == requests
    for request in generated:
        assert request.tenant in {f"tenant-{number}" for number in range(tenants)}
        assert least <= request.prompt_tokens == len(request.prompt_token_ids) <= longest
        assert least <= request.output_tokens <= longest
        assert all(FIRST_TOKEN_ID <= token < vocab for token in request.prompt_token_ids)


EXPECTED = {
    "overload": {"tenant-0": 1.5, "tenant-1": 3.0},
    "overload-multi": {f"tenant-{number}": 0.4 if number < 3 else 0.6 for number in range(8)},
    "overload-weighted": {"tenant-0": 0.8, "tenant-1": 0.8, "tenant-2": 1.2, "tenant-3": 1.6},
    "proportional": {"tenant-0": 0.25, "tenant-1": 0.5, "tenant-2": 1.5},
    "on_off_less": {"tenant-0": 0.25, "tenant-1": 2.0},
    "on_off_overload": {"tenant-0": 1.0, "tenant-1": 3.0},
    "poisson_on_off_overload": {"tenant-0": 0.25, "tenant-1": 2.0},
    "poisson_short_long": {"tenant-0": 8.0, "tenant-1": 1.5},
    "poisson_short_long_2": {"tenant-0": 8.0, "tenant-1": 1.5},
    "increase": {"tenant-0": 0.5, "tenant-1": 1.1},
    "dist_shift": {"tenant-0": (0.3 + 1.0 + 0.5) / 3, "tenant-1": (2.0 + 1.0 + 1.5) / 3},
}
"""Requests per second of each tenant over the whole experiment; of 300 s with pauses of 60 s, 180 s are on."""


def test_every_experiment_has_its_expected_rates_or_a_test_of_its_own() -> None:
    assert set(EXPERIMENTS) - set(EXPECTED) == {"real"}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_experiment_has_its_tenants_rates_and_duration(name: str) -> None:
    duration_s = {"overload": 360, "overload-multi": 360, "overload-weighted": 360, "dist_shift": 900}.get(name, 600)
    requests = made(f"experiment={name}")
    counts = Counter(request.tenant for request in requests)
    random = name.startswith("poisson")
    assert {tenant: count / duration_s for tenant, count in counts.items()} == {
        tenant: pytest.approx(rate, rel=0.3 if random else 0.02) for tenant, rate in EXPECTED[name].items()
    }
    assert duration_s - 20 < requests[-1].arrival_s < duration_s


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("overload", {"tenant-0": (256, 256), "tenant-1": (256, 256)}),
        ("poisson_short_long", {"tenant-0": (64, 64), "tenant-1": (256, 256)}),
        ("poisson_short_long_2", {"tenant-0": (512, 32), "tenant-1": (32, 512)}),
    ],
)
def test_an_experiment_of_fixed_lengths_has_them(name: str, lengths: dict[str, tuple[int, int]]) -> None:
    for request in made(f"experiment={name}"):
        assert (request.prompt_tokens, request.output_tokens) == lengths[request.tenant]


def test_the_weighted_experiment_has_weights_of_one_to_four() -> None:
    source = Synthetic.parse("synthetic:experiment=overload-weighted")
    assert source.weights() == {f"tenant-{number}": number + 1.0 for number in range(4)}


def test_the_first_tenant_of_the_shift_pauses_for_a_minute_in_its_first_phase_only() -> None:
    arrivals_s = [one.arrival_s for one in made("experiment=dist_shift") if one.tenant == "tenant-0"]
    assert not [one for one in arrivals_s if 60 <= one < 120 or 180 <= one < 240]
    assert [one for one in arrivals_s if 360 <= one < 420]


def test_the_ramp_of_the_increase_ends_ten_times_as_fast_as_it_begins() -> None:
    arrivals_s = [one.arrival_s for one in made("experiment=increase") if one.tenant == "tenant-1"]
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s)]
    assert (1 / gaps_s[0], 1 / gaps_s[-1]) == (pytest.approx(0.2, rel=0.1), pytest.approx(2.0, rel=0.01))


def test_the_made_up_real_trace_is_skewed_and_has_the_rate_and_lengths_of_the_lost_one() -> None:
    requests = made("experiment=real")
    counts = Counter(request.tenant for request in requests)
    assert len(counts) == 27
    assert len(requests) / 600 == pytest.approx(3.5, rel=0.1)
    assert counts["tenant-0"] / len(requests) == pytest.approx(0.26, abs=0.05)
    assert max(request.prompt_tokens for request in requests) <= 1024
    # The cut at 1,024 takes a little off the means of 136 and 256.
    assert statistics.fmean(request.prompt_tokens for request in requests) == pytest.approx(133, rel=0.1)
    assert statistics.fmean(request.output_tokens for request in requests) == pytest.approx(238, rel=0.1)


def test_keys_beside_an_experiment_hold_for_all_its_streams() -> None:
    requests = made("experiment=overload,prompt_mean=8,prompt_max=8,duration=20")
    assert {request.prompt_tokens for request in requests} == {8}
    assert len(requests) == 30 + 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("request=5", "Unknown workload key 'request': use one of experiment, requests, duration,"),
        ("seed=1,seed=2", "seed appears twice"),
        ("requests=2.5", "requests must be a whole number"),
        ("requests=", "requests must be a whole number"),
        ("rate=fast", "rate must be a number"),
        ("tenant=", "tenant must not be empty"),
        ("requests=0", "requests must be at least 1"),
        ("tenants=0", "tenants must be at least 1"),
        ("rate=-1", "rate must not be negative"),
        ("rate=nan", "rate must not be negative"),
        ("rate=1e-320", "rate must be 0, or at least 1e-09"),
        ("rate_end=1e-320,duration=9", "rate_end must be 0, or at least 1e-09"),
        ("prompt_max=99999999", "prompt_max must be at most 16777216"),
        ("start=-1", "start must not be negative"),
        ("spread=inf", "spread must be finite"),
        ("spread=11", "spread must be at most 10"),
        ("zipf=-1", "zipf must not be negative"),
        ("cv=0.001", "cv must be 0, or between 0.01 and 100"),
        ("weight=0", "weight must be above 0"),
        ("duration=0", "duration must be above 0"),
        ("duration=nan", "duration must be above 0"),
        ("duration=inf", "duration must be finite"),
        ("on=0", "on must be above 0"),
        ("off=3", "off needs the key on"),
        ("rate_end=3", "rate_end needs a duration"),
        ("rate=0,rate_end=0,duration=3", "rate_end needs .* finite rates, one of them above 0"),
        ("rate=inf,duration=3", "rate must be above 0 and finite, or requests"),
        ("lengths=normal", "lengths must be one of lognormal, uniform"),
        ("prompt_mean=200", "prompt_mean must be between 1 and prompt_max \\(120\\): raise prompt_max as well"),
        ("output_mean=nan", "output_mean must be between 1 and output_max"),
        ("output_min=0", "output_min must be between 1 and output_max \\(140\\)"),
        ("output_min=141", "output_min must be between 1 and"),
        ("vocab=3", "vocab must be above 3"),
        ("tenant=a,weight=1/tenant=a,weight=2", "weight differs between streams of the tenant a"),
        ("experiment=nosuch", "experiment must be one of overload, overload-multi"),
        ("experiment=overload/rate=3", "experiment stands for all streams: write none after it"),
        ("rate=3/experiment=overload", "experiment stands for all streams: write none before it"),
    ],
)
def test_a_bad_text_is_refused_in_a_sentence_that_names_the_key(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Synthetic.parse(f"synthetic:{text}")
    assert str(error.value).endswith(".")


def test_a_source_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the workload key requests or duration"):
        Synthetic(streams=(Stream(),))


def test_prompts_of_a_tenant_begin_with_one_of_its_prefixes() -> None:
    source = "synthetic:requests=60,tenants=2,prefixes=3,prefix_tokens=100"
    requests = list(Synthetic.parse(source).requests())
    assert requests == list(Synthetic.parse(source).requests())
    begun = {(each.tenant, each.prefix_hashes, each.prompt_token_ids[:100]) for each in requests}
    assert len(begun) == 2 * 3, "three for each tenant, and none of them another's"
    assert {len(hashes) for _, hashes, _ in begun} == {2}
    assert len({hashes for _, hashes, _ in begun}) == 6
    for each in requests:
        assert each.prompt_tokens == len(each.prompt_token_ids) > 100
        assert each.hash_tokens == 64


@pytest.mark.parametrize("keys", ["prefixes=-1", "prefixes=9999999", "prefixes=1,prefix_tokens=0"])
def test_prefixes_out_of_range_are_refused(keys: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Synthetic.parse(f"synthetic:{keys}")
