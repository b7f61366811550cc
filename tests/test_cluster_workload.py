"""Goal: a source text gives the same requests everywhere and always, within the limits that it states.

Method: sentences about single settings, and random settings whose requests must stay inside them.
"""

import dataclasses
import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.workload import FIRST_TOKEN_ID, RequestRecord, RequestSpec, SyntheticSource, synthetic

EXAMPLE = (
    "synthetic:requests=60,rate=8,tenants=4,prompt_mean=60,prompt_max=120,output_mean=80,output_max=140,"
    "vocab=512,seed=0"
)


def test_the_example_text_says_what_the_defaults_are() -> None:
    assert SyntheticSource.parse(EXAMPLE) == SyntheticSource() == SyntheticSource.parse("synthetic:")


def test_requests_are_numbered_sorted_by_arrival_and_the_first_arrives_at_once() -> None:
    requests = synthetic(EXAMPLE)
    assert [request.request_id for request in requests] == [f"request-{number}" for number in range(60)]
    arrivals_s = [request.arrival_s for request in requests]
    assert arrivals_s[0] == 0
    assert arrivals_s == sorted(arrivals_s)
    assert {request.tenant for request in requests} == {f"tenant-{number}" for number in range(4)}


def test_one_seed_gives_the_same_requests_and_another_seed_gives_others() -> None:
    assert synthetic("synthetic:seed=3") == synthetic("synthetic:seed=3")
    assert synthetic("synthetic:seed=3") != synthetic("synthetic:seed=4")


def test_the_very_requests_of_a_seed_do_not_change_with_the_code() -> None:
    """Old result files name their workload by its text alone."""
    first, second = synthetic(requests=2, prompt_mean=2, prompt_max=4, seed=7)
    assert first == RequestSpec(
        request_id="request-0", tenant="tenant-2", arrival_s=0.0, prompt_token_ids=(468, 262, 112), output_tokens=31
    )
    assert (second.arrival_s, second.prompt_token_ids) == (pytest.approx(0.004777, abs=1e-6), (292, 66))


def test_settings_by_keyword_replace_those_of_the_text() -> None:
    assert synthetic("synthetic:requests=9,seed=2", seed=5) == synthetic("synthetic:requests=9,seed=5")
    assert len(synthetic(requests=3)) == 3


@pytest.mark.parametrize("rate", [0, math.inf])
def test_without_a_finite_rate_all_requests_arrive_at_once(rate: float) -> None:
    assert {request.arrival_s for request in synthetic(rate=rate)} == {0.0}
    assert {request.arrival_s for request in synthetic(f"synthetic:rate={rate}")} == {0.0}


def test_the_rate_changes_arrivals_and_nothing_else_and_is_met_on_average() -> None:
    fast, slow = synthetic(requests=2000, rate=50), synthetic(requests=2000, rate=25)
    gaps_s = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(fast)]
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 50, rel=0.15)  # exponential: as wide as its mean
    assert [dataclasses.replace(request, arrival_s=0.0) for request in fast] == [
        dataclasses.replace(request, arrival_s=0.0) for request in slow
    ]


def test_lengths_have_their_mean_where_the_cut_is_far_away() -> None:
    requests = synthetic(requests=3000, prompt_max=2000, output_max=2000)
    assert statistics.fmean(len(request.prompt_token_ids) for request in requests) == pytest.approx(60, rel=0.05)
    assert statistics.fmean(request.output_tokens for request in requests) == pytest.approx(80, rel=0.05)


def test_without_spread_every_length_is_its_mean() -> None:
    for request in synthetic(spread=0, prompt_mean=7, output_mean=140):
        assert (len(request.prompt_token_ids), request.output_tokens, request.num_tokens) == (7, 140, 147)


@given(
    requests=st.integers(1, 40),
    tenants=st.integers(1, 5),
    longest=st.integers(1, 60),
    share=st.floats(0, 1),
    spread=st.floats(0, 3),
    vocab=st.integers(FIRST_TOKEN_ID + 1, 1000),
    seed=st.integers(0, 99),
)
def test_whatever_the_settings_requests_stay_inside_them(
    requests: int, tenants: int, longest: int, share: float, spread: float, vocab: int, seed: int
) -> None:
    mean = 1 + share * (longest - 1)
    made = SyntheticSource(
        requests=requests, tenants=tenants, prompt_mean=mean, prompt_max=longest, output_mean=mean, output_max=longest,
        spread=spread, vocab=vocab, seed=seed,
    ).generate()  # fmt: skip
    assert len({request.request_id for request in made}) == requests
    for request in made:
        assert request.tenant in {f"tenant-{number}" for number in range(tenants)}
        assert 1 <= len(request.prompt_token_ids) <= longest
        assert 1 <= request.output_tokens <= longest
        assert all(FIRST_TOKEN_ID <= token < vocab for token in request.prompt_token_ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("azure:trace.csv", "Workload 'azure:trace.csv' is not known: write synthetic:KEY=VALUE"),
        ("synthetic:request=5", "Unknown workload key 'request': use one of requests, rate,"),
        ("synthetic:seed=1,seed=2", "seed appears twice"),
        ("synthetic:requests=2.5", "requests must be a whole number"),
        ("synthetic:requests=", "requests must be a whole number"),
        ("synthetic:rate=fast", "rate must be a number"),
        ("synthetic:requests=0", "requests must be at least 1"),
        ("synthetic:tenants=0", "tenants must be at least 1"),
        ("synthetic:rate=-1", "rate must not be negative"),
        ("synthetic:rate=nan", "rate must not be negative"),
        ("synthetic:spread=inf", "spread must be finite"),
        ("synthetic:prompt_mean=200", "prompt_mean must be between 1 and prompt_max \\(120\\)"),
        ("synthetic:output_mean=nan", "output_mean must be between 1 and output_max"),
        ("synthetic:vocab=3", "vocab must be above 3"),
    ],
)
def test_a_bad_text_is_refused_in_a_sentence_that_names_the_key(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SyntheticSource.parse(text)
    assert str(error.value).endswith(".")


def test_an_unknown_keyword_is_refused_as_in_a_text() -> None:
    with pytest.raises(ValueError, match="Unknown workload key 'request'"):
        synthetic(request=5)


def test_a_record_that_contradicts_itself_is_a_mistake_of_the_engine() -> None:
    record = RequestRecord(
        request_id="a", tenant="t", arrival_s=0, first_token_s=1, finish_s=2, prompt_tokens=3, output_tokens=4,
        delivered_tokens=4,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="tokens left"):
        dataclasses.replace(record, delivered_tokens=3)
    with pytest.raises(AssertionError, match="without a time"):
        dataclasses.replace(record, first_token_s=None)
