"""Checks a request's headers, bytes and fields, and returns the body that may be forwarded.

Rules:
- Pure, and total: whatever the client sent, the result is a checked value or a `RequestError` with a 4xx status.
- Work is linear in the input, and nothing is parsed before its size and nesting are known.
- The forwarded body is built anew from the fields that were checked; nothing else of the client's body gets in.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from cluster.openai_errors import RequestError, invalid, model_not_found
from cluster.request_fields import (
    MAX_LABEL_CHARS,
    STREAM_OPTIONS,
    Rule,
    chat_rules,
    completion_rules,
    is_label,
    is_token_ids,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a chat message may have."""

USER_HEADER = b"x-adaptivellm-user"
"""Names one of a tenant's own users, for clients that cannot set `user` in the body."""

Headers = Sequence[tuple[bytes, bytes]]

_COMPLETION_MAX_TOKENS = 16  # what the API defines for a completion without `max_tokens`
_MISSING = "missing_required_parameter"
_UNSUPPORTED = "unsupported_parameter"

# A whole string, or what is left of one that never ends, or one bracket. The end quote is optional so that no match
# fails after a long string and starts over inside it; possessive, so that no way back is kept.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_JSON_CONTENT_TYPE = re.compile(
    r'application/json[ \t]*(;[ \t]*(charset[ \t]*=[ \t]*"?utf-?8"?[ \t]*)?)?', re.IGNORECASE
)

_LIMIT_BOUNDS = {
    "max_body_bytes": (1024, 1 << 30),
    "max_header_bytes": (1024, 1 << 20),
    "max_headers": (8, 10_000),
    "max_json_depth": (4, 256),  # json recurses, and a thousand frames are all that Python has
    "max_choices_n": (1, 128),
    "max_stop_strings": (1, 4),  # the engine takes no more
    "max_prompts": (1, 1024),  # the engine takes no more
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How much one request may bring and ask for.

    Raises:
        ValueError: A limit is not a whole number or out of its bounds.
    """

    max_body_bytes: int = 1 << 20
    """Length of the body, in bytes."""

    max_header_bytes: int = 16384
    """All header names and values together, in bytes."""

    max_headers: int = 100
    """Number of header lines."""

    max_json_depth: int = 32
    """Objects and lists inside each other; the body itself is the first."""

    max_choices_n: int = 8
    """Largest `n`: sequences per prompt."""

    max_stop_strings: int = 4
    """Longest list in `stop`."""

    max_prompts: int = 16
    """Longest list of prompts in one completion."""

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = _LIMIT_BOUNDS[field.name]
            value = getattr(self, field.name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{field.name} must be a whole number from {low} to {high}.")


def check_headers(headers: Headers, limits: RequestLimits) -> None:
    """Refuse oversized headers.

    Raises:
        RequestError: 431, too many headers or too many bytes in them.
    """
    if len(headers) > limits.max_headers:
        raise RequestError(431, f"Send at most {limits.max_headers} headers.", None, "headers_too_large")
    if sum(len(name) + len(value) for name, value in headers) > limits.max_header_bytes:
        raise RequestError(431, f"Send at most {limits.max_header_bytes} bytes of headers.", None, "headers_too_large")


def check_content_type(headers: Headers) -> None:
    """Refuse a body that does not claim to be JSON.

    Raises:
        RequestError: 415, not exactly one `application/json` (with no charset but UTF-8).
    """
    given = [value for name, value in headers if name.lower() == b"content-type"]
    if len(given) != 1 or not _JSON_CONTENT_TYPE.fullmatch(given[0].decode("latin-1").strip(" \t")):
        raise RequestError(
            415, "Send the body as JSON with `Content-Type: application/json`.", None, "unsupported_media_type"
        )


def parse_body(body: bytes, limits: RequestLimits) -> dict[str, Any]:
    """Read the JSON object in a body. Every number in it is finite, every string can be encoded as UTF-8.

    Raises:
        RequestError: 413, too long; 400, not UTF-8, not JSON, nested too deep or not an object.
    """
    if len(body) > limits.max_body_bytes:
        raise RequestError(
            413, f"The body must not be longer than {limits.max_body_bytes} bytes.", None, "request_too_large"
        )
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad_json("The body must be encoded as UTF-8.") from None
    _check_depth(text, limits.max_json_depth)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except ValueError:  # malformed, or an integer of thousands of digits
        raise _bad_json("The body must be valid JSON.") from None
    if not isinstance(value, dict):
        raise _bad_json("The body must be a JSON object.")
    _check_encodable(text, value)
    return value


def check_chat(
    body: Mapping[str, Any], *, models: Collection[str], max_model_len: int, limits: RequestLimits
) -> dict[str, Any]:
    """Check a parsed `/v1/chat/completions` body and return the new one to forward.

    Args:
        models: Names of the models that are served.
        max_model_len: Context of the model, in tokens.

    Raises:
        RequestError: 404, unknown model; 400, any other fault, with `param` naming the field.
    """
    checked: dict[str, Any] = {"model": _checked_model(body, models), "messages": _checked_messages(body)}
    rules = chat_rules(
        max_tokens=max_model_len, max_choices=limits.max_choices_n, max_stop_strings=limits.max_stop_strings
    )
    checked |= _checked_fields(body, rules)
    if checked.get("top_logprobs") and not checked.get("logprobs"):
        raise invalid("top_logprobs", "top_logprobs needs logprobs to be true.")
    _check_combinations(body, checked, max_output_tokens(checked, max_model_len))
    return checked


def check_completion(
    body: Mapping[str, Any], *, models: Collection[str], max_model_len: int, limits: RequestLimits
) -> dict[str, Any]:
    """Check a parsed `/v1/completions` body and return the new one to forward; arguments and errors as `check_chat`."""
    checked: dict[str, Any] = {
        "model": _checked_model(body, models),
        "prompt": _checked_prompt(body, limits.max_prompts),
    }
    rules = completion_rules(
        max_tokens=max_model_len, max_choices=limits.max_choices_n, max_stop_strings=limits.max_stop_strings
    )
    checked |= _checked_fields(body, rules)
    if checked.get("echo") and "logprobs" in checked:
        raise invalid("echo", "echo cannot be used together with logprobs: leave one out.", _UNSUPPORTED)
    _check_combinations(body, checked, max_output_tokens(checked, max_model_len))
    return checked


def user_of(checked: Mapping[str, Any], headers: Headers) -> str:
    """Return the account inside the tenant that a checked request is for: `user` in the body, else the header; or "".

    Raises:
        RequestError: 400, several such headers, or one that is no short text.
    """
    given = [value for name, value in headers if name.lower() == USER_HEADER]
    if len(given) > 1 or any(
        not is_label(text := value.decode("latin-1")) or not text.isprintable() for value in given
    ):
        name = USER_HEADER.decode()
        raise invalid(None, f"Send at most one {name} header, of 1 to {MAX_LABEL_CHARS} printable characters.")
    return checked.get("user") or "".join(value.decode("latin-1") for value in given)


def max_output_tokens(checked: Mapping[str, Any], max_model_len: int) -> int:
    """Return the most tokens that a checked request may generate; in a chat without a limit, what the context holds."""
    if "messages" in checked:
        return int(checked.get("max_completion_tokens", checked.get("max_tokens", max_model_len)))
    return int(checked.get("max_tokens", _COMPLETION_MAX_TOKENS))


def _check_depth(text: str, max_depth: int) -> None:
    if text.count("[") + text.count("{") <= max_depth:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = text[match.start()]
        if token in "[{":
            depth += 1
            if depth > max_depth:
                raise _bad_json(f"The body must not be nested deeper than {max_depth} levels.")
        elif token in "]}":
            depth -= 1


def _check_encodable(text: str, value: dict[str, Any]) -> None:
    """Refuse half of a surrogate pair: JSON can spell it, UTF-8 and tokenizers cannot."""
    if not _SURROGATE_ESCAPE.search(text):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad_json("The body must not hold half of a surrogate pair: send whole characters.") from None


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("not a JSON number")


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError("too large for a float")
    return value


def _bad_json(message: str) -> RequestError:
    return invalid(None, message, "invalid_json")


def _checked_model(body: Mapping[str, Any], models: Collection[str]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model", "model must be the name of a model: see /v1/models.", _code_for(model))
    if model not in models:
        raise model_not_found()
    return model


def _checked_fields(body: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    checked = {}
    for name, rule in rules.items():
        value = body.get(name)
        if value is None:
            continue
        if not rule.accepts(value):
            raise invalid(name, f"{name} {rule.demand}.", rule.code)
        if rule.forwarded:
            checked[name] = value
    if options := checked.get("stream_options"):
        checked["stream_options"] = {key: options[key] for key in STREAM_OPTIONS if options.get(key) is not None}
    return checked


def _check_combinations(body: Mapping[str, Any], checked: Mapping[str, Any], max_tokens: int) -> None:
    """Check fields that depend on each other in both endpoints; `max_tokens` is what would apply."""
    if "stream_options" in checked and not checked.get("stream"):
        raise invalid("stream_options", "stream_options needs stream to be true.")
    if checked.get("min_tokens", 0) > max_tokens:
        raise invalid("min_tokens", "min_tokens must not be greater than max_tokens: lower it or raise max_tokens.")
    choices = checked.get("n", 1)
    if (body.get("best_of") or 1) > choices:
        raise invalid("best_of", "best_of must not be greater than n.", _UNSUPPORTED)
    if choices > 1 and checked.get("temperature") == 0:
        raise invalid("n", "n must be 1 at temperature 0: all choices would be the same.")


def _checked_prompt(body: Mapping[str, Any], max_prompts: int) -> object:
    prompt = body.get("prompt")
    if _is_prompt(prompt):
        return prompt
    if isinstance(prompt, list) and 1 <= len(prompt) <= max_prompts:
        one_kind = all(isinstance(item, type(prompt[0])) for item in prompt)
        if one_kind and all(_is_prompt(item) for item in prompt):
            return prompt
    raise invalid(
        "prompt",
        f"prompt must be a string, a list of token ids, or a list of at most {max_prompts} of either, none of them empty.",
        _code_for(prompt),
    )


def _is_prompt(value: object) -> bool:
    return bool(value) and (isinstance(value, str) or is_token_ids(value))


def _checked_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "messages must be a list with at least one message.", _code_for(messages))
    return [_checked_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _checked_message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid("messages", f"{where} must be an object with role and content.")
    if message.get("role") not in ROLES:
        raise invalid("messages", f"The role of {where} must be one of {', '.join(ROLES)}.")
    if message.get("tool_calls") or message.get("function_call"):
        raise invalid("messages", f"{where} holds tool calls, which are not supported: leave them out.", _UNSUPPORTED)
    checked = {"role": message["role"], "content": _checked_content(where, message.get("content"))}
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is None:
            continue
        if not is_label(value):
            raise invalid("messages", f"The {name} of {where} must be a string of 1 to {MAX_LABEL_CHARS} characters.")
        checked[name] = value
    return checked


def _checked_content(where: str, content: object) -> object:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid("messages", f"The content of {where} must be a string or a list of text parts.")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise invalid(
                "messages", f"The content of {where} may hold text only: other media are not supported.", _UNSUPPORTED
            )
        if not isinstance(part.get("text"), str):
            raise invalid("messages", f"Each text part in the content of {where} must have a string in text.")
    return [{"type": "text", "text": part["text"]} for part in content]


def _code_for(value: object) -> str:
    return _MISSING if value is None else "invalid_value"
