"""Goal: every request is sent when it arrives, whatever is under way, and what came back is counted as it was.

Method: the client against a small HTTP server that streams as OpenAI's API does, and misbehaves on request; no engine.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from cluster.prompts import RequestSpec
from cluster.served_client import Endpoint, ServedRun, drive, find_endpoint
from tests.cluster_runs import free_port
from tests.streaming_server import (
    BROKEN,
    CONTEXT,
    CUT,
    ENDLESS,
    MERGED,
    MISCOUNTED,
    MODEL,
    REFUSED,
    WRONG,
    Server,
    serving,
)

KEYS = {"a": "key-of-a", "b": "key-of-b"}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(*KEYS.values()) as running:
        yield running


def request(number: int, output_tokens: int, *, tenant: str = "a", arrival_s: float = 0.0) -> RequestSpec:
    return RequestSpec(
        request_id=f"r{number}", tenant=tenant, arrival_s=arrival_s, prompt_token_ids=(7, 8, number),
        output_tokens=output_tokens,
    )  # fmt: skip


def sent(server: Server, *requests: RequestSpec, limit_s: float = 20.0) -> ServedRun:
    endpoint = Endpoint(url=server.url, model=MODEL, context_tokens=None)
    return asyncio.run(drive(endpoint, KEYS, requests, limit_s=limit_s))


def test_a_request_is_sent_once_with_its_prompt_length_and_tenants_key(server: Server) -> None:
    run = sent(server, request(1, 5), request(2, 6, tenant="b"))
    bodies = sorted(zip(server.users, server.bodies, strict=True), key=lambda pair: pair[0])
    assert [(user, body["prompt"], body["max_tokens"]) for user, body in bodies] == [
        ("key-of-a", [7, 8, 1], 5), ("key-of-b", [7, 8, 2], 6)
    ]  # fmt: skip
    for body in server.bodies:
        assert (body["min_tokens"], body["ignore_eos"]) == (body["max_tokens"], True)
        assert (body["temperature"], body["stream"], body["model"]) == (0, True, MODEL)
    assert [record.delivered_tokens for record in run.records] == [5, 6]
    for record in run.records:
        assert record.first_token_s is not None
        assert record.finish_s is not None
        assert 0 < record.first_token_s < record.finish_s <= run.run_end_s
    assert run.outcomes["b"] == {"served": 1, "rejected": 0, "failed": 0, "unfinished": 0}
    assert run.client_cpu_s > 0


def test_requests_are_sent_when_they_arrive_whatever_is_under_way(server: Server) -> None:
    began_s = time.perf_counter()
    run = sent(
        server, request(0, ENDLESS), *(request(number, 3, arrival_s=0.1 * number) for number in range(1, 6)), limit_s=1.5
    )  # fmt: skip
    assert all(at_s - began_s >= 0.1 * number for number, at_s in enumerate(sorted(server.times_s)))
    assert [record.finish_s is None for record in run.records] == [True, False, False, False, False, False]
    assert len(server.times_s) == 6


def test_what_is_unfinished_at_the_limit_has_the_tokens_that_were_seen_and_no_end(server: Server) -> None:
    run = sent(server, request(1, ENDLESS), request(2, 4, arrival_s=60.0), limit_s=1.0)
    begun, unsent = run.records
    assert (begun.delivered_tokens, begun.finish_s) == (5, None)
    assert (unsent.delivered_tokens, unsent.first_token_s, unsent.finish_s) == (0, None, None)
    assert run.outcomes["a"]["unfinished"] == 2
    assert 1.0 <= run.run_end_s < 10
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("output_tokens", "outcome", "num_delivered"),
    [
        (REFUSED, "rejected", 0),
        (BROKEN, "failed", 0),
        (CUT, "failed", 5),
        (MISCOUNTED, "failed", 3),
        (MERGED, "served", 3002),
    ],
)
def test_an_answer_that_is_none_counts_as_what_it_is(
    server: Server, output_tokens: int, outcome: str, num_delivered: int
) -> None:
    run = sent(server, request(1, output_tokens), request(2, 4, tenant="b"))
    assert run.outcomes["a"][outcome] == 1
    record, other = run.records
    assert (record.finish_s is None) == (outcome != "served")
    assert record.delivered_tokens == num_delivered
    assert other.finish_s is not None


def test_a_server_that_is_gone_has_failed(server: Server) -> None:
    gone = Endpoint(url=f"http://127.0.0.1:{free_port()}", model=MODEL, context_tokens=None)
    run = asyncio.run(drive(gone, KEYS, [request(1, 4)], limit_s=10))
    assert run.outcomes["a"]["failed"] == 1


def test_a_request_that_the_server_calls_wrong_ends_the_run_in_a_sentence_without_the_servers_text(
    server: Server,
) -> None:
    with pytest.raises(ValueError, match=r"answers 400 \(context_length_exceeded\) to a request of 3 prompt") as error:
        sent(server, request(1, WRONG), request(2, ENDLESS))
    assert "key" not in str(error.value)


def test_a_run_survives_the_way_through_json(server: Server) -> None:
    run = sent(server, request(1, 5))
    assert ServedRun.of(json.loads(json.dumps(asdict(run)))) == run


def test_an_endpoint_says_its_model_and_context(server: Server) -> None:
    found = asyncio.run(find_endpoint(server.url, KEYS))
    assert found == Endpoint(url=server.url, model=MODEL, context_tokens=CONTEXT)


def test_a_key_that_is_refused_is_named_by_its_tenant(server: Server) -> None:
    with pytest.raises(ValueError, match="the key of tenant b is refused") as error:
        asyncio.run(find_endpoint(server.url, {"a": "key-of-a", "b": "secret"}))
    assert "secret" not in str(error.value)


def test_where_nothing_answers_one_sentence_says_so() -> None:
    with pytest.raises(ValueError, match="does not answer as OpenAI's API does"):
        asyncio.run(find_endpoint(f"http://127.0.0.1:{free_port()}", KEYS))
