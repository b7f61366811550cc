"""Goal: how an answer ended is read out of it, whatever it says, and the client gets what it asked for.

Method: events as vLLM sends them (tests/test_contracts_vllm.py holds the two marks to vLLM's own classes).
"""

import json
from typing import Any

import pytest

from cluster.answers import AnswerReader, Ending, wants_usage, with_usage


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def token(text: str, finish_reason: str | None = None, index: int = 0) -> str:
    return event({"id": "1", "choices": [{"index": index, "text": text, "finish_reason": finish_reason}]})


USAGE = event({"id": "1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}})
DONE = "data: [DONE]\n\n"


def read(*events: str, wants_usage: bool = False) -> tuple[list[str], list[Ending]]:
    endings: list[Ending] = []
    reader = AnswerReader(wants_usage=wants_usage, on_end=endings.append)
    return [one for one in events if reader.read(one)], endings


def test_usage_that_nobody_asked_for_is_read_and_kept_from_the_client() -> None:
    events = (token("a"), token("b", "stop"), USAGE, DONE)
    passed, (ending,) = read(*events)
    assert passed == [events[0], events[1], DONE]
    assert (ending.output_tokens, ending.by_itself, ending.cut) == (7, True, False)


def test_a_client_that_asked_for_usage_gets_it() -> None:
    events = (token("a", "length"), USAGE, DONE)
    passed, (ending,) = read(*events, wants_usage=True)
    assert passed == list(events)
    assert (ending.by_itself, ending.cut) == (False, True)


def test_an_answer_that_breaks_off_has_no_ending() -> None:
    assert read(token("a"), token("b", "stop"))[1] == []
    assert read(token("a"), event({"error": {"message": "m"}}), DONE)[1] == []


@pytest.mark.parametrize(
    "text", ['"finish_reason":"stop"', '"choices":[]', '{"choices":[],"usage":{"completion_tokens":1}}']
)
def test_no_text_can_pretend_to_be_an_ending(text: str) -> None:
    assert read(token(text)) == ([token(text)], [])


@pytest.mark.parametrize(
    ("reasons", "by_itself", "cut"),
    [(["stop"], True, False), (["length"], False, True), (["abort"], False, False), ([], False, False),
     (["stop", "stop"], True, False), (["stop", "length"], False, False), ([None], False, False)],
)  # fmt: skip
def test_an_ending_is_one_of_its_own_or_at_the_limit_or_neither(reasons: list[Any], by_itself: bool, cut: bool) -> None:
    endings: list[Ending] = []
    AnswerReader(wants_usage=False, on_end=endings.append).read_whole(reasons, 5)
    assert endings == [Ending(reasons=reasons, output_tokens=5)]
    assert (endings[0].by_itself, endings[0].cut) == (by_itself, cut)


@pytest.mark.parametrize(
    ("checked", "added", "wanted"),
    [
        ({}, {}, False),
        ({"stream": False}, {}, False),
        ({"stream": True}, {"stream_options": {"include_usage": True}}, False),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}},
         {"stream_options": {"include_usage": True}}, False),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, {}, True),
    ],
)  # fmt: skip
def test_every_stream_tells_its_usage_to_the_ingress(
    checked: dict[str, Any], added: dict[str, Any], wanted: bool
) -> None:
    assert with_usage(checked) == added
    assert wants_usage(checked) == wanted
