"""Goal: whatever a client sends, the answer is a checked body or a 4xx in OpenAI's shape that names the field.

Method: one sentence per rule, tables of good and bad values per field, and junk from hypothesis.
"""

import json
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.openai_errors import RequestError, invalid
from cluster.request_checks import (
    RequestLimits,
    check_chat,
    check_completion,
    check_content_type,
    check_headers,
    parse_body,
    user_of,
)
from replicas.request_stamp import make_stamp

LIMITS = RequestLimits()
MODEL = "tiny"
MAX_MODEL_LEN = 1024
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": MODEL, "prompt": "Hello"}

COMMON_FIELDS = {
    "model", "max_tokens", "min_tokens", "n", "stream", "stream_options", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "bad_words",
    "logit_bias", "logprobs", "ignore_eos", "skip_special_tokens", "user",
}  # fmt: skip
CHAT_FIELDS = COMMON_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt", "echo"}


def chat(**fields: Any) -> dict[str, Any]:
    return check_chat({**CHAT, **fields}, models={MODEL}, max_model_len=MAX_MODEL_LEN, limits=LIMITS)


def completion(**fields: Any) -> dict[str, Any]:
    return check_completion({**COMPLETION, **fields}, models={MODEL}, max_model_len=MAX_MODEL_LEN, limits=LIMITS)


BOTH = pytest.mark.parametrize("check", [chat, completion])


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **kwargs)
    return caught.value


def outcome(call: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
    """The result, or the `RequestError` instead of it; any other exception is a failure of the test."""
    try:
        return call(*args, **kwargs)
    except RequestError as error:
        return error


def refused_field(call: Callable[..., object], **fields: Any) -> str | None:
    error = refusal(call, **fields)
    assert error.status == 400
    assert error.type == "invalid_request_error"
    assert error.message.endswith(".")
    return error.param


# Accounts inside a tenant


@BOTH
def test_the_user_in_the_body_goes_before_the_one_in_the_header(check: Callable[..., Any]) -> None:
    header = [(b"X-AdaptiveLLM-User", b"from the header")]
    assert user_of(check(user="from the body"), header) == "from the body"
    assert user_of(check(user=""), header) == user_of(check(), header) == "from the header"
    assert user_of(check(), []) == user_of(check(), [(b"x-user", b"u")]) == ""


@pytest.mark.parametrize("values", [[b""], [b"a", b"a"], [b"x" * 257], [b"a\tb"], [b"a\x85"]])
def test_a_user_header_that_is_no_short_text_is_400(values: list[bytes]) -> None:
    error = refusal(user_of, chat(), [(b"x-adaptivellm-user", value) for value in values])
    assert (error.status, error.param) == (400, None)
    assert "x-adaptivellm-user" in error.message


# The error itself


def test_an_error_has_openai_shape() -> None:
    assert invalid("n", "n must be 1.").body() == {
        "error": {"message": "n must be 1.", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }


def test_an_error_prints_its_message() -> None:
    assert str(invalid("n", "n must be 1.")) == "n must be 1."


def test_an_error_survives_pickling() -> None:
    error = RequestError(
        401, "No key.", None, "invalid_api_key", "authentication_error", {"WWW-Authenticate": "Bearer"}
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.body(), copy.headers) == (401, error.body(), {"WWW-Authenticate": "Bearer"})


def test_an_error_with_a_status_that_is_no_error_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        RequestError(200, "Fine.")


# Limits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_body_bytes", 0),
        ("max_header_bytes", -1),
        ("max_headers", True),
        ("max_json_depth", 3),
        ("max_json_depth", 100_000),
        ("max_choices_n", 0),
        ("max_stop_strings", 5),
        ("max_prompts", 1.5),
        ("max_prompts", "16"),
        ("max_prompts", None),
    ],
)
def test_a_limit_out_of_bounds_is_a_value_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number from"):
        RequestLimits(**{name: value})


def test_limits_can_be_sent_to_another_process() -> None:
    limits = RequestLimits(max_prompts=2)
    assert pickle.loads(pickle.dumps(limits)) == limits


# Headers


def test_ordinary_headers_pass() -> None:
    check_headers([(b"host", b"localhost"), (b"authorization", b"Bearer k")], LIMITS)


@pytest.mark.parametrize(
    "headers", [[(b"x", b"y")] * 101, [(b"x", b"y" * 65536)], [(b"x" * 65536, b"")], [(b"x", b"y" * 200)] * 90]
)
def test_too_many_or_too_large_headers_are_431(headers: list[tuple[bytes, bytes]]) -> None:
    assert refusal(check_headers, headers, LIMITS).status == 431


def test_headers_exactly_at_the_limits_pass() -> None:
    check_headers([(b"x", b"y")] * 100, LIMITS)
    check_headers([(b"x", b"y" * 16383)], LIMITS)


@pytest.mark.parametrize(
    "value",
    [
        b"application/json",
        b"Application/JSON",
        b" application/json ;charset=UTF-8",
        b'application/json; charset="utf-8"',
        b"application/json;",
    ],
)
def test_json_content_types_pass(value: bytes) -> None:
    check_content_type([(b"host", b"localhost"), (b"Content-Type", value)])


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"text/plain"],
        [b"application/jsonl"],
        [b"application/json; charset=latin-1"],
        [b"application/json, text/plain"],
        [b"multipart/form-data; boundary=x"],
        [b"application/json", b"application/json"],
        [b"\xff\xfe"],
    ],
)
def test_other_or_several_content_types_are_415(values: list[bytes]) -> None:
    assert refusal(check_content_type, [(b"content-type", value) for value in values]).status == 415


# The body's bytes


def test_an_object_is_read() -> None:
    assert parse_body('{"a": [1, -2.5e3, "ä\\n", null], "b": {}}'.encode(), LIMITS) == {
        "a": [1, -2500.0, "ä\n", None],
        "b": {},
    }


def test_of_duplicate_keys_the_last_one_counts() -> None:
    assert parse_body(b'{"a": 1, "a": 2}', LIMITS) == {"a": 2}


def test_a_body_over_the_limit_is_413() -> None:
    limits = RequestLimits(max_body_bytes=1024)
    assert parse_body(b"{}".ljust(1024), limits) == {}
    assert refusal(parse_body, b"{}".ljust(1025), limits).status == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": }',
        b"{'a': 1}",
        b'{"a": 1} x',
        b'{"a": "\n"}',
        b'{"a": "unfinished',
        b'{"a": "\\',
        b"\xef\xbb\xbf{}",
        b"]" * 50 + b"[" * 50,
    ],
)
def test_malformed_json_is_400(body: bytes) -> None:
    assert refusal(parse_body, body, LIMITS).body()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"true"])
def test_json_that_is_no_object_is_400(body: bytes) -> None:
    error = refusal(parse_body, body, LIMITS)
    assert (error.status, error.message) == (400, "The body must be a JSON object.")


@pytest.mark.parametrize("body", [b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16"), b'{"a": "\xed\xa0\x80"}'])
def test_a_body_that_is_not_utf_8_is_400(body: bytes) -> None:
    assert "UTF-8" in refusal(parse_body, body, LIMITS).message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000])
def test_a_number_that_is_not_finite_or_has_thousands_of_digits_is_400(number: str) -> None:
    assert refusal(parse_body, f'{{"a": {number}}}'.encode(), LIMITS).status == 400


@pytest.mark.parametrize("text", [r"\ud800", r"\uDFFF", r"\ude00\ud83d", r"x\ud83dx"])
def test_half_a_surrogate_pair_is_400_in_values_and_in_keys(text: str) -> None:
    assert "surrogate" in refusal(parse_body, f'{{"a": ["{text}"]}}'.encode(), LIMITS).message
    assert "surrogate" in refusal(parse_body, f'{{"{text}": 1}}'.encode(), LIMITS).message


def test_whole_surrogate_pairs_and_escaped_backslashes_pass() -> None:
    assert parse_body(rb'{"a": "\ud83d\ude00", "b": "\\ud800"}', LIMITS) == {"a": "😀", "b": "\\ud800"}


def test_nesting_up_to_the_limit_passes_and_one_deeper_is_400() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert parse_body(nested(32), LIMITS)
    assert "deeper than 32" in refusal(parse_body, nested(33), LIMITS).message


def test_brackets_in_strings_are_no_nesting() -> None:
    text = 'say \\" [[[{{{ \\\\'
    body = b'{"a": ["' + (text * 50).encode() + b'"]}'
    assert parse_body(body, LIMITS)["a"] == ['say " [[[{{{ \\' * 50]


def test_many_lists_side_by_side_are_no_nesting() -> None:
    assert len(parse_body(b'{"a": [' + b",".join([b"[]"] * 5000) + b"]}", LIMITS)["a"]) == 5000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":[' * 50_000 + b"]}" * 50_000,
        b"[]" * 40 + b'"' + b'\\"' * 500_000,
        b'{"a":"' + b"[" * 1_000_000,
        b"[]" * 500_000,
    ],
)
def test_deep_nesting_and_endless_strings_are_refused_in_linear_time(body: bytes) -> None:
    started = time.monotonic()
    assert refusal(parse_body, body, RequestLimits(max_body_bytes=1 << 21)).status == 400
    assert time.monotonic() - started < 5  # it takes milliseconds; quadratic work would take an hour


# Model, messages, prompt


def test_a_plain_request_is_forwarded_as_it_is() -> None:
    assert chat() == CHAT
    assert completion() == COMPLETION


def test_the_forwarded_body_is_a_new_one() -> None:
    body = {**CHAT, "extra": 1}
    check_chat(body, models=[MODEL], max_model_len=8, limits=LIMITS)["model"] = "other"
    assert body == {**CHAT, "extra": 1}


@BOTH
@pytest.mark.parametrize("model", [None, "", 1, [MODEL], {}])
def test_a_model_that_is_no_name_is_400(check: Callable[..., Any], model: Any) -> None:
    assert refused_field(check, model=model) == "model"


@BOTH
def test_an_unknown_model_is_404(check: Callable[..., Any]) -> None:
    error = refusal(check, model="other")
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_required_field_of_a_chat_is_named(field: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != field}
    error = refusal(check_chat, body, models=[MODEL], max_model_len=8, limits=LIMITS)
    assert (error.status, error.param, error.code) == (400, field, "missing_required_parameter")


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_a_missing_required_field_of_a_completion_is_named(field: str) -> None:
    body = {name: value for name, value in COMPLETION.items() if name != field}
    error = refusal(check_completion, body, models=[MODEL], max_model_len=8, limits=LIMITS)
    assert (error.status, error.param, error.code) == (400, field, "missing_required_parameter")


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_known_roles_pass(role: str) -> None:
    messages = [{"role": role, "content": ""}]
    assert chat(messages=messages)["messages"] == messages


def test_text_parts_pass_and_lose_what_is_not_text() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": ""}]
    assert chat(messages=[{"role": "user", "content": parts}])["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}
    ]


def test_a_message_keeps_only_known_keys() -> None:
    message = {
        "role": "tool", "content": "42", "name": "f", "tool_call_id": "call_1",
        "tool_calls": [], "function_call": None, "refusal": None, "task": "x", "tools": [1],
    }  # fmt: skip
    kept = {"role": "tool", "content": "42", "name": "f", "tool_call_id": "call_1"}
    assert chat(messages=[message])["messages"] == [kept]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        {},
        "Hello",
        [None],
        ["Hello"],
        [[]],
        [{}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "root", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": {}, "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 1}],
        [{"role": "user", "content": {}}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [None]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "user", "content": "x", "name": 1}],
        [{"role": "user", "content": "x", "name": ""}],
        [{"role": "tool", "content": "x", "tool_call_id": "x" * 257}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "assistant", "content": "x", "tool_calls": 1}],
        [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}],
    ],
)
def test_bad_messages_are_400(messages: Any) -> None:
    assert refused_field(chat, messages=messages) == "messages"


@pytest.mark.parametrize("part_type", ["image_url", "input_audio", "video_url", "image_embeds", None, 1, []])
def test_other_media_than_text_are_refused_as_such(part_type: Any) -> None:
    error = refusal(chat, messages=[{"role": "user", "content": [{"type": part_type, "image_url": {"url": "x"}}]}])
    assert (error.status, error.param, error.code) == (400, "messages", "unsupported_parameter")


def test_a_bad_message_is_pointed_out_by_its_place() -> None:
    good = {"role": "user", "content": "x"}
    assert "messages[2]" in refusal(chat, messages=[good, good, {"role": "user"}]).message


@pytest.mark.parametrize("prompt", ["x", "\0", ["x"], ["x"] * 16, [0], [2**31 - 1] * 5000, [[1, 2], [3]], [[1]] * 16])
def test_good_prompts_pass(prompt: Any) -> None:
    assert completion(prompt=prompt)["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        None, "", [], [""], ["x"] * 17, [[1]] * 17, [[]], [[1], []], ["x", [1]], [1, "x"], ["x", 1], [[1], "x"],
        [-1], [2**31], [2**63], [1.0], [True], [None], [[True]], [["x"]], [[[1]]], {}, 1, True,
    ],
)  # fmt: skip
def test_bad_prompts_are_400(prompt: Any) -> None:
    assert refused_field(completion, prompt=prompt) == "prompt"


# Optional fields

NO_NUMBERS: list[Any] = ["1", True, [1], {}, float("nan"), float("inf"), float("-inf")]
NO_WHOLE_NUMBERS: list[Any] = [*NO_NUMBERS, 1.5, 1.0, 10**30, -(10**30)]
NO_FLAGS: list[Any] = [0, 1, "true", [], {}]

GOOD_AND_BAD: dict[str, tuple[list[Any], list[Any]]] = {
    "max_tokens": ([1, MAX_MODEL_LEN], [0, -1, MAX_MODEL_LEN + 1, *NO_WHOLE_NUMBERS]),
    "min_tokens": ([0, 16], [-1, MAX_MODEL_LEN + 1, *NO_WHOLE_NUMBERS]),
    "n": ([1, 8], [0, -1, 9, 100_000, *NO_WHOLE_NUMBERS]),
    "stream": ([True, False], NO_FLAGS),
    "temperature": ([0, 0.5, 2], [-0.1, 2.1, 10**400, *NO_NUMBERS]),
    "top_p": ([0.001, 1], [0, -0.1, 1.1, *NO_NUMBERS]),
    "top_k": ([-1, 0, 50], [-2, 2**31, *NO_WHOLE_NUMBERS]),
    "min_p": ([0, 1], [-0.1, 1.1, *NO_NUMBERS]),
    "presence_penalty": ([-2, 0.0, 2], [-2.1, 2.1, *NO_NUMBERS]),
    "frequency_penalty": ([-2, 0.0, 2], [-2.1, 2.1, *NO_NUMBERS]),
    "repetition_penalty": ([0.5, 1, 1.2], [0, -1, 1e-40, 1e39, 10**400, *NO_NUMBERS]),
    "seed": ([0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, *NO_WHOLE_NUMBERS]),
    "stop": (["x", [], ["a", "b", "c", "d"], "x" * 256], ["", [""], ["x"] * 5, "x" * 257, [1], [None], 1, {}, True]),
    "stop_token_ids": ([[], [0, 2**31 - 1], [1] * 128], [[-1], [2**31], [True], ["1"], [1.0], [1] * 129, 1, "1", {}]),
    "bad_words": ([[], ["x"] * 128], [[""], ["x"] * 129, [1], ["x" * 257], "x", {}, 1]),
    "logit_bias": (
        [{}, {"0": -100, "5": 100, "7": 0.5}, {str(token): 1 for token in range(300)}],
        [
            {"0": 101}, {"0": -101}, {"-1": 1}, {"x": 1}, {"": 1}, {"1.0": 1}, {" 1": 1}, {"٣": 1}, {"2147483648": 1},
            {"9" * 5000: 1}, {"1": "1"}, {"1": True}, {"1": None}, {"1": float("nan")}, [], 1, "x",
            {str(token): 1 for token in range(301)},
        ],
    ),
    "ignore_eos": ([True, False], NO_FLAGS),
    "skip_special_tokens": ([True, False], NO_FLAGS),
    "user": (["", "x" * 256], ["x" * 257, 1, [], {}, True]),
}  # fmt: skip
CHAT_ONLY: dict[str, tuple[list[Any], list[Any]]] = {
    "max_completion_tokens": ([1, MAX_MODEL_LEN], [0, MAX_MODEL_LEN + 1, *NO_WHOLE_NUMBERS]),
    "logprobs": ([True, False], NO_FLAGS),
    "top_logprobs": ([0], [-1, 6, *NO_WHOLE_NUMBERS]),
}
COMPLETION_ONLY: dict[str, tuple[list[Any], list[Any]]] = {
    "logprobs": ([0, 5], [-1, 6, *NO_WHOLE_NUMBERS]),
    "echo": ([True, False], NO_FLAGS),
}

Case = tuple[Callable[..., Any], str, Any]


def _cases(which: int) -> list[Case]:
    return [
        (check, name, value)
        for check, own in ((chat, CHAT_ONLY), (completion, COMPLETION_ONLY))
        for name, values in {**GOOD_AND_BAD, **own}.items()
        for value in values[which]
    ]


def _case_id(case: Case) -> str:
    check, name, _ = case
    return f"{'chat' if check is chat else 'completion'}-{name}"


def test_the_tables_here_cover_every_allowed_field() -> None:
    required_or_tested_below = {"model", "messages", "prompt", "stream_options"}
    assert {*GOOD_AND_BAD, *CHAT_ONLY} == CHAT_FIELDS - required_or_tested_below
    assert {*GOOD_AND_BAD, *COMPLETION_ONLY} == COMPLETION_FIELDS - required_or_tested_below


@pytest.mark.parametrize("case", _cases(0), ids=_case_id)
def test_a_good_value_is_forwarded(case: Case) -> None:
    check, name, value = case
    assert check(**{name: value})[name] == value


@pytest.mark.parametrize("case", _cases(1), ids=_case_id)
def test_a_bad_value_is_400_and_names_its_field(case: Case) -> None:
    check, name, value = case
    assert refused_field(check, **{name: value}) == name


@BOTH
def test_null_means_left_out(check: Callable[..., Any]) -> None:
    nulls = dict.fromkeys((CHAT_FIELDS | COMPLETION_FIELDS | {"tools", "cache_salt"}) - {"model", "messages", "prompt"})
    assert check(**nulls) == check()


@BOTH
def test_unknown_fields_are_ignored_and_not_forwarded(check: Callable[..., Any]) -> None:
    assert check(metadata={"a": 1}, store=True, service_tier="auto", **{"": 0, "x" * 10_000: 1}) == check()


@BOTH
def test_a_client_cannot_say_what_the_ingress_says_to_the_scheduler(check: Callable[..., Any]) -> None:
    stamp = make_stamp(tenant="another", user="u", weight=9.0, age_s=99.0, median_tokens=1, upper_tokens=1)
    assert refused_field(check, vllm_xargs=stamp) == "vllm_xargs"
    for smuggled in (stamp, {"extra_args": stamp}, {"extra_body": {"vllm_xargs": stamp}}, {"sampling_params": stamp}):
        assert check(**smuggled) == check()


REFUSED = {
    "prompt_logprobs": 1,
    "allowed_token_ids": [1],
    "logits_processors": ["x"],
    "repetition_detection": {"max_pattern_size": 3},
    "use_beam_search": True,
    "best_of": 2,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "guided_json": {},
    "guided_regex": "a*",
    "guided_choice": ["a"],
    "guided_grammar": "root ::= x",
    "guided_decoding_backend": "x",
    "chat_template": "{{ x }}",
    "chat_template_kwargs": {"chat_template": "x"},
    "documents": [{"text": "x"}],
    "add_generation_prompt": False,
    "continue_final_message": True,
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
    "functions": [{}],
    "function_call": "auto",
    "modalities": ["audio"],
    "audio": {"voice": "x"},
    "prompt_embeds": "AAAA",
    "media_io_kwargs": {"image": {}},
    "mm_processor_kwargs": {"code_revision": "x"},
    "kv_transfer_params": {"do_remote_decode": True},
    "ec_transfer_params": {"a": 1},
    "cache_salt": "x",
    "priority": -1000,
    "vllm_xargs": {"tenant": "x"},
    "data_parallel_rank": 0,
    "request_id": "x",
    "session_id": "x",
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_what_reaches_into_the_engine_is_refused_by_name(check: Callable[..., Any], name: str) -> None:
    error = refusal(check, **{name: REFUSED[name]})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")


@BOTH
def test_defaults_of_refused_fields_are_accepted_and_dropped(check: Callable[..., Any]) -> None:
    defaults: dict[str, Any] = {
        "use_beam_search": False, "priority": 0, "tools": [], "tool_choice": "none", "best_of": 1,
        "response_format": {"type": "text"}, "add_generation_prompt": True, "continue_final_message": False,
        "modalities": ["text"], "chat_template_kwargs": {}, "vllm_xargs": {}, "kv_transfer_params": {},
    }  # fmt: skip
    assert check(**defaults) == check()


@BOTH
@pytest.mark.parametrize(("name", "value"), [("priority", False), ("use_beam_search", 0), ("priority", 0.0)])
def test_a_default_of_another_type_is_refused(check: Callable[..., Any], name: str, value: Any) -> None:
    assert refused_field(check, **{name: value}) == name


@pytest.mark.parametrize("value", [{}, {"type": None}, {"type": ["text"]}, "text", [], 1])
def test_a_response_format_that_is_not_plain_text_is_refused(value: Any) -> None:
    assert refused_field(chat, response_format=value) == "response_format"


def test_a_chat_has_no_echo() -> None:
    assert refused_field(chat, echo=True) == "echo"
    assert "echo" not in chat(echo=False)


def test_a_completion_has_no_suffix() -> None:
    assert refused_field(completion, suffix="x") == "suffix"
    assert "suffix" not in completion(suffix="")


# Fields that depend on each other


@pytest.mark.parametrize("logprobs", [0, 1])
def test_echo_and_logprobs_together_are_refused(logprobs: int) -> None:
    assert refused_field(completion, echo=True, logprobs=logprobs) == "echo"
    assert completion(echo=False, logprobs=logprobs)["logprobs"] == logprobs


def test_top_logprobs_needs_logprobs() -> None:
    assert refused_field(chat, top_logprobs=1) == "top_logprobs"
    assert refused_field(chat, top_logprobs=1, logprobs=False) == "top_logprobs"
    assert chat(top_logprobs=5, logprobs=True)["top_logprobs"] == 5


@BOTH
def test_stream_options_needs_stream(check: Callable[..., Any]) -> None:
    options = {"include_usage": True}
    assert refused_field(check, stream_options=options) == "stream_options"
    assert refused_field(check, stream_options=options, stream=False) == "stream_options"
    assert check(stream_options=options, stream=True)["stream_options"] == options


def test_unknown_and_null_stream_options_are_dropped() -> None:
    options = {"include_usage": None, "continuous_usage_stats": False, "include_obfuscation": False, "x": [1]}
    assert chat(stream_options=options, stream=True)["stream_options"] == {"continuous_usage_stats": False}


@pytest.mark.parametrize("options", [True, "x", [], 1, {"include_usage": 1}, {"continuous_usage_stats": "yes"}])
def test_bad_stream_options_are_refused(options: Any) -> None:
    assert refused_field(chat, stream=True, stream_options=options) == "stream_options"


@BOTH
def test_min_tokens_must_not_exceed_max_tokens(check: Callable[..., Any]) -> None:
    assert refused_field(check, min_tokens=6, max_tokens=5) == "min_tokens"
    assert check(min_tokens=5, max_tokens=5)["min_tokens"] == 5


def test_min_tokens_is_compared_with_the_limit_that_applies() -> None:
    assert refused_field(chat, min_tokens=6, max_tokens=9, max_completion_tokens=5) == "min_tokens"
    assert refused_field(completion, min_tokens=17) == "min_tokens"
    assert chat(min_tokens=17)["min_tokens"] == 17


@BOTH
def test_best_of_must_not_exceed_n(check: Callable[..., Any]) -> None:
    assert refused_field(check, best_of=3, n=2) == "best_of"
    assert "best_of" not in check(best_of=2, n=2)


@BOTH
def test_several_choices_at_temperature_zero_are_refused(check: Callable[..., Any]) -> None:
    assert refused_field(check, n=2, temperature=0) == "n"
    assert refused_field(check, n=2, temperature=0.0) == "n"
    assert check(n=2, temperature=0.5)["n"] == 2


def test_the_limits_are_the_ones_given() -> None:
    limits = RequestLimits(max_choices_n=2, max_stop_strings=1, max_prompts=3)

    def check(**fields: Any) -> dict[str, Any]:
        return check_completion({**COMPLETION, **fields}, models=[MODEL], max_model_len=10, limits=limits)

    assert check(n=2, stop=["x"], prompt=["x"] * 3, max_tokens=10)
    assert refused_field(check, n=3) == "n"
    assert refused_field(check, stop=["x", "y"]) == "stop"
    assert refused_field(check, prompt=["x"] * 4) == "prompt"
    assert refused_field(check, max_tokens=11) == "max_tokens"


# Junk

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([MODEL, "user", "text", 0, 1]),
)
KEYS = st.one_of(
    st.sampled_from(["role", "content", "type", "text", "include_usage", "1", "name", "tool_calls"]),
    st.text(max_size=5),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
FIELDS = sorted(CHAT_FIELDS | COMPLETION_FIELDS | set(REFUSED) | {"suffix", "unknown"})
PLAUSIBLE = [
    value
    for table in (GOOD_AND_BAD, CHAT_ONLY, COMPLETION_ONLY)
    for good, bad in table.values()
    for value in [*good, *bad[:2]]
]
BODIES = st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(PLAUSIBLE), max_size=6)


NESTED = st.recursive(
    st.text(alphabet='[]{}"\\ä,:', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[{"', max_size=2), inner, max_size=3),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def assert_object_or_4xx(result: Any) -> None:
    assert isinstance(result, dict) or (isinstance(result, RequestError) and 400 <= result.status < 500)


@given(st.binary())
def test_arbitrary_bytes_are_an_object_or_a_4xx(body: bytes) -> None:
    assert_object_or_4xx(outcome(parse_body, body, LIMITS))


@given(JSON, st.binary(max_size=3), st.integers(0, 60))
def test_slightly_damaged_json_is_an_object_or_a_4xx(value: Any, damage: bytes, at: int) -> None:
    body = json.dumps({"a": value}).encode()
    assert_object_or_4xx(outcome(parse_body, body[:at] + damage + body[at:], LIMITS))


@given(NESTED, st.integers(4, 10), st.booleans())
def test_the_nesting_that_is_measured_is_the_nesting_that_is_parsed(value: Any, limit: int, ascii_only: bool) -> None:
    whole = [[[{"a": value}]]]
    body = json.dumps({"a": whole}, ensure_ascii=ascii_only).encode()
    result = outcome(parse_body, body, RequestLimits(max_json_depth=limit))
    if depth_of({"a": whole}) > limit:
        assert result.status == 400
    else:
        assert result == {"a": whole}


@pytest.mark.parametrize(("check", "allowed"), [(chat, CHAT_FIELDS), (completion, COMPLETION_FIELDS)])
@given(BODIES)
def test_arbitrary_fields_are_allow_listed_or_a_4xx(
    check: Callable[..., dict[str, Any]], allowed: set[str], fields: dict[str, Any]
) -> None:
    checked = outcome(check, **fields)
    assert_object_or_4xx(checked)
    if isinstance(checked, RequestError):
        assert checked.param in FIELDS
        return
    assert set(checked) <= allowed
    assert check(**checked) == checked, "a checked body passes unchanged"
    json.dumps(checked, allow_nan=False)


@BOTH
@pytest.mark.parametrize("name", [*FIELDS, "other"])
def test_no_error_echoes_what_the_client_sent(check: Callable[..., Any], name: str) -> None:
    canary = "c4n4ry"
    for value in (
        canary * 50,
        [canary] * 200,
        {canary: canary},
        [{"role": canary}],
        [{"role": "user", canary: canary}],
    ):
        result = outcome(check, **{name: value})
        if isinstance(result, RequestError):
            assert canary not in repr(result) + json.dumps(result.body())


@pytest.mark.parametrize("body", [b'{"c4n4ry": }', b'"c4n4ry"', b'{"c4n4ry": "\xff"}', b'{"c4n4ry": NaN}', b"c4n4ry"])
def test_no_parse_error_echoes_what_the_client_sent(body: bytes) -> None:
    error = refusal(parse_body, body, LIMITS)
    assert "c4n4ry" not in repr(error) + json.dumps(error.body())
    assert error.__suppress_context__ or error.__context__ is None
