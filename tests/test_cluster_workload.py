"""Goal: the options of a command make the workload that they say, the same at every reading, for all commands alike.

Method: sources of a few lines; the public traces where they are at hand.
"""

import argparse
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.workload import Workload, add_workload_arguments, workload_of
from cluster.workload_summary import Summary
from tests.shared_data import needs_data

HEAD = "arrival_s,tenant,prompt_tokens,output_tokens\n"
STEADY = "synthetic:tenants=1,tenant=a,rate=1,cv=0,duration=100,spread=0"


def trace(folder: Path, *lines: str) -> str:
    (folder / "t.csv").write_text(HEAD + "".join(f"{line}\n" for line in lines))
    return f"csv:{folder / 't.csv'}"


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_workload_arguments(parser, default="synthetic:")
    return parser.parse_args(arguments)


def test_options_that_are_left_out_change_nothing(tmp_path: Path) -> None:
    source = trace(tmp_path, "0,a,10,20", "1,b,30,40")
    workload = workload_of(options("--trace", source), default="synthetic:")
    assert workload == Workload(trace=source)
    assert [(one.tenant, one.prompt_tokens) for one in workload.requests()] == [("a", 10), ("b", 30)]
    assert workload_of(options(), default="synthetic:seed=3").trace == "synthetic:seed=3"


def test_every_option_reaches_the_workload() -> None:
    given = options(
        "--trace", STEADY, "--window", "10:60", "--rate-scale", "2", "--first", "30", "--length-scale", "0.5",
        "--max-tokens", "50", "--flood", "rate=1,cv=0,tenant=x,prompt_mean=9", "--bad-requests", "drop", "--seed", "5",
    )  # fmt: skip
    requests = list(workload_of(given, default="").requests())
    assert Counter(one.tenant for one in requests) == {"a": 30, "x": 15}
    assert [one.arrival_s for one in requests if one.tenant == "a"][:4] == [0, 0.5, 1, 1.5]
    assert Counter(one.tenant for one in requests[:9]) == {"a": 6, "x": 3}
    # 60 and 80 tokens are halved, and 70 cut to 50; the flood's 9 and 80 on average only cut
    assert {(one.prompt_tokens, one.output_tokens) for one in requests if one.tenant == "a"} == {(25, 25)}


def test_every_reading_is_the_same_and_a_seed_changes_it() -> None:
    workload = Workload(trace="synthetic:", flood="rate=3")
    assert list(workload.requests()) == list(workload.requests())
    assert workload.prompted(512) == workload.prompted(512)
    assert list(Workload(trace="synthetic:", flood="rate=3", seed=1).requests()) != list(workload.requests())
    assert Workload(trace="synthetic:seed=1").prompted(512) == Workload(trace="synthetic:", seed=1).prompted(512)


def test_a_rate_is_met_whatever_the_sources_own() -> None:
    requests = list(Workload(trace=STEADY, rate=5).requests())
    assert {round(after.arrival_s - before.arrival_s, 9) for before, after in pairwise(requests)} == {0.2}


def test_a_rate_is_that_of_the_requests_that_are_taken() -> None:
    source = "synthetic:tenant=a,rate=1,cv=0,duration=50/tenant=a,rate=10,start=50"
    for given in ({"first": 40}, {"window": "50:70"}, {}):
        times_s = [one.arrival_s for one in Workload(trace=source, rate=4, **given).requests()]  # type: ignore[arg-type]
        assert (len(times_s) - 1) / (times_s[-1] - times_s[0]) == pytest.approx(4)


def test_a_source_of_any_length_is_read_as_far_as_it_is_asked_for() -> None:
    workload = Workload(trace="synthetic:requests=999999999999", rate_scale=2, length_scale=2, flood="rate=1")
    assert len(list(islice(workload.requests(), 50))) == 50


def test_a_request_that_is_scaled_up_has_a_prompt_as_long() -> None:
    for request in Workload(trace=STEADY, length_scale=1.5, first=3).prompted(512):
        assert len(request.prompt_token_ids) == 90


def test_a_trace_without_tenants_has_one_or_as_many_as_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.0,30,40\n" * 200)
    source = f"azure:{tmp_path}"
    assert {one.tenant for one in Workload(trace=source).requests()} == {"tenant-0"}
    assert {one.tenant for one in Workload(trace=source, tenants=3).requests()} == {f"tenant-{n}" for n in range(3)}


def test_bad_requests_stop_the_reading_or_are_left_out_and_counted(tmp_path: Path) -> None:
    source = trace(tmp_path, "0,a,10,20", "1,a,0,5", "2,a,5000,5", "3,a,1,1")
    with pytest.raises(
        ValueError, match=r"prompt_tokens in line 3 of .*t\.csv must be above 0\. Or leave .*: --bad-requests drop"
    ):
        list(Workload(trace=source).requests())
    dropped = Counter[str]()
    lenient = Workload(trace=source, bad_requests="drop")
    assert [one.line for one in lenient.requests(dropped, context_tokens=4096)] == [2, 5]
    assert dropped == {"zero length": 1, "context": 1}


def test_a_request_beyond_the_context_stops_the_reading_unless_it_is_cut(tmp_path: Path) -> None:
    source = trace(tmp_path, "0,a,10,20", "1,a,5000,5")
    with pytest.raises(ValueError, match=r"line 3 of csv:t\.csv has 5005 tokens and the model's context 4096"):
        list(Workload(trace=source).requests(context_tokens=4096))
    (_, request) = Workload(trace=source, max_tokens=4096).requests(context_tokens=4096)
    assert (request.prompt_tokens, request.output_tokens) == (4091, 5)


def test_weights_are_those_of_the_source_and_of_the_flood(tmp_path: Path) -> None:
    workload = Workload(trace="synthetic:experiment=overload-weighted", flood="rate=1,weight=0.5")
    assert workload.weights() == {"tenant-0": 1, "tenant-1": 2, "tenant-2": 3, "tenant-3": 4, "flood": 0.5}
    assert Workload(trace=trace(tmp_path, "0,a,1,1")).weights() == {}


def test_a_flood_may_be_a_tenant_of_the_source_with_its_weight() -> None:
    workload = Workload(trace="synthetic:experiment=overload-weighted", flood="tenant=tenant-3,rate=9,weight=4")
    assert workload.weights()["tenant-3"] == 4
    assert Counter(one.tenant for one in workload.requests())["tenant-3"] > 576 + 9 * 300


def test_a_result_names_what_was_given_and_no_folder(tmp_path: Path) -> None:
    workload = Workload(trace=trace(tmp_path, "0,a,1,1"), rate=2.0, seed=3)
    assert workload.as_report() == {"trace": "csv:t.csv", "rate": 2.0, "seed": 3}
    assert Workload(trace=STEADY).as_report() == {"trace": STEADY}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trace": "nosuch:x"}, "--trace 'nosuch:x' must be SOURCE:PATH with a source of azure"),
        ({"trace": "synthetic"}, "--trace 'synthetic' must be SOURCE:PATH"),
        ({"trace": "synthetic:nosuch=1"}, "Unknown workload key 'nosuch'"),
        ({"window": "5"}, "--window must be FROM:TO"),
        ({"window": "5:5"}, "--window must be FROM:TO"),
        ({"window": "-1:5"}, "--window must be FROM:TO"),
        ({"window": "a:b"}, "--window must be FROM:TO"),
        ({"window": "nan:5"}, "--window must be FROM:TO"),
        ({"rate_scale": 0.0}, "--rate-scale must be above 0 and finite"),
        ({"rate": float("inf")}, "--rate must be above 0 and finite"),
        ({"rate": 1.0, "rate_scale": 1.0}, "--rate-scale and --rate exclude each other"),
        ({"length_scale": float("nan")}, "--length-scale must be above 0"),
        ({"first": 0}, "--first must be above 0"),
        ({"tenants": -1}, "--tenants must be above 0"),
        ({"tenant_skew": -1.0}, "--tenant-skew must be between 0 and 10"),
        ({"tenant_skew": 1.0}, "--tenant-skew needs --tenants"),
        ({"rate": 1e-320}, "--rate must be at least 1e-09"),
        ({"rate_scale": 1e-320}, "--rate-scale must be at least 1e-09"),
        ({"trace": "synthetic:experiment=overload-weighted", "flood": "tenant=tenant-3"}, "tenant-3: add weight=4"),
        ({"max_tokens": 1}, "--max-tokens must be at least 2"),
        ({"bad_requests": "keep"}, "--bad-requests must be stop or drop"),
        ({"flood": "rate=0"}, "rate must be above 0 and finite, or requests"),
        ({"flood": "experiment=overload"}, "--flood is one stream"),
        ({"flood": "speed=3"}, "Unknown workload key 'speed'"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_sentence_that_names_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Workload(**{"trace": "synthetic:"} | given)
    assert str(error.value)[-1] in ".…"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": "900:901"}, "No request is left of the --trace"),
        ({"trace": "synthetic:rate=inf", "rate": 5.0}, "--rate cannot be met"),
        ({"tenants": 4}, "--tenants is for traces without tenants"),
        ({"length_scale": 1e300}, "--length-scale makes a request longer than 16777216 tokens"),
        ({"flood": "start=900"}, "--flood begins when the last request has come"),
        ({"trace": "synthetic:rate=inf", "flood": "rate=9"}, "--flood begins when the last request has come"),
        ({"rate_scale": 100.0, "flood": "start=5"}, "--flood begins when the last request has come"),
    ],
)
def test_an_option_that_does_not_fit_the_source_is_refused_at_the_first_request(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**{"trace": "synthetic:"} | given).requests()


def test_a_source_with_more_token_ids_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 512 and the workload needs 600"):
        Workload(trace="synthetic:", flood="rate=1,vocab=600").prompted(512)


PUBLIC = (
    "azure:azure_llm_2023", "mooncake:mooncake", "vtc:vtc_arena", "servegen:servegen/sampled_deepseek-r1_1h_4rps.csv",
    "servegen:servegen/sampled_m-large_1h_8rps.csv",
)  # fmt: skip


@needs_data
@pytest.mark.parametrize("source", PUBLIC)
def test_a_public_trace_is_described(source: str, data: Path) -> None:
    name, _, path = source.partition(":")
    text = Summary.of(Workload(trace=f"{name}:{data / path}", flood="rate=1").requests()).text()
    assert "requests/s" in text
    assert ("Shared prefixes" in text) is (name == "mooncake")


@needs_data
def test_turns_of_a_conversation_have_equal_prompts_as_far_as_they_share_them(data: Path) -> None:
    workload = Workload(trace=f"mooncake:{data / 'mooncake'}", first=300, length_scale=1 / 32, tenants=9)
    requests, prompted = list(workload.requests()), workload.prompted(32_000)
    shared = 0
    for before, after in pairwise(range(300)):
        pair = [requests[number].prefix_hashes for number in (before, after)]
        equal = next(
            n for n in range(len(pair[0]) + 1) if pair[0][n : n + 1] != pair[1][n : n + 1] or n == len(pair[0])
        )
        tokens = min(equal * 16, *(requests[number].prompt_tokens for number in (before, after)))
        first, second = (prompted[number].prompt_token_ids for number in (before, after))
        assert first[:tokens] == second[:tokens]
        shared += tokens
    assert shared > 299 * 15  # all have the first block
