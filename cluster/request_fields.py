"""Which optional request fields exist, what each may hold, and whether it travels on to the engine.

Rules:
- A field that is in no table is unknown: ignored, as OpenAI does, and never forwarded.
- A field that reaches into the engine's internals, or that would change the answer in a way that is not supported, is
  refused by name unless it holds its default.
- Ranges are closed on both sides so that no number can overflow a 32-bit tensor in the engine.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

MAX_TOKEN_ID = 2**31 - 1
"""Largest token id that fits the engine's 32-bit tensors; the vocabulary is smaller, and the engine checks that."""

MAX_LABEL_CHARS = 256
"""Length of a stop string, a bad word, a name or a user label, in characters."""

MAX_LISTED = 128
"""Entries of `bad_words` and `stop_token_ids`."""

MAX_BIASED_TOKENS = 300
"""Entries of `logit_bias`, as OpenAI allows."""

MAX_LOGPROBS = 5
"""Alternatives per output token."""

STREAM_OPTIONS = ("include_usage", "continuous_usage_stats")
"""Keys of `stream_options` that are forwarded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one field may hold. Null is never shown to a rule: it means the same as leaving the field out."""

    accepts: Callable[[Any], bool]
    """Whether a JSON value is allowed."""

    demand: str
    """The rest of the sentence that begins with the field's name, for a value that is not."""

    code: str = "invalid_value"
    """The error's code."""

    forwarded: bool = True
    """False: the field is checked and then left out of the forwarded body."""


@cache
def chat_rules(*, max_tokens: int, max_choices: int, max_stop_strings: int) -> Mapping[str, Rule]:
    """Return the optional fields of `/v1/chat/completions`.

    Args:
        max_tokens: Tokens that fit the model's context.
        max_choices: Largest `n`.
        max_stop_strings: Longest list in `stop`.
    """
    return {
        **_common_rules(max_tokens, max_choices, max_stop_strings),
        "max_completion_tokens": _whole(1, max_tokens),
        "logprobs": _flag(),
        "top_logprobs": _whole(0, MAX_LOGPROBS),
        # The engine would turn it into prompt log probabilities.
        "echo": _unsupported(False),
    }


@cache
def completion_rules(*, max_tokens: int, max_choices: int, max_stop_strings: int) -> Mapping[str, Rule]:
    """Return the optional fields of `/v1/completions`; arguments as in `chat_rules`."""
    return {
        **_common_rules(max_tokens, max_choices, max_stop_strings),
        "logprobs": _whole(0, MAX_LOGPROBS),
        "echo": _flag(),
        "suffix": _unsupported(""),
    }


def is_whole(value: object, low: int, high: int) -> TypeGuard[int]:
    """Whether a JSON value is an integer in a range; true and false are none."""
    return type(value) is int and low <= value <= high


def is_token_ids(value: object) -> bool:
    """Whether a JSON value is a list of token ids, empty or not."""
    return isinstance(value, list) and all(is_whole(item, 0, MAX_TOKEN_ID) for item in value)


def is_label(value: object) -> TypeGuard[str]:
    """Whether a JSON value is a short string with something in it."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_LABEL_CHARS


def _common_rules(max_tokens: int, max_choices: int, max_stop_strings: int) -> dict[str, Rule]:
    return {
        "max_tokens": _whole(1, max_tokens),
        "min_tokens": _whole(0, max_tokens),
        "n": _whole(1, max_choices),
        "best_of": _whole(1, max_choices, forwarded=False),
        "stream": _flag(),
        "stream_options": _STREAM_OPTIONS,
        "temperature": _number(0, 2),
        "top_p": Rule(
            accepts=lambda value: _is_number(value, 0, 1) and value > 0,
            demand="must be a number above 0 and at most 1",
        ),
        "top_k": _whole(-1, MAX_TOKEN_ID),
        "min_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        # Logits are divided by it in 32 bits: far outside this range all become infinite or not a number.
        "repetition_penalty": _number(0.01, 100),
        "seed": Rule(
            accepts=lambda value: is_whole(value, -(2**63), 2**63 - 1), demand="must be a whole number of 64 bits"
        ),
        "stop": Rule(
            accepts=lambda value: is_label(value) or _is_labels(value, max_stop_strings),
            demand=f"must be a string of 1 to {MAX_LABEL_CHARS} characters or a list of at most "
            f"{max_stop_strings} of them",
        ),
        "stop_token_ids": Rule(
            accepts=lambda value: is_token_ids(value) and len(value) <= MAX_LISTED,
            demand=f"must be a list of at most {MAX_LISTED} token ids",
        ),
        "bad_words": Rule(
            accepts=lambda value: _is_labels(value, MAX_LISTED),
            demand=f"must be a list of at most {MAX_LISTED} strings of 1 to {MAX_LABEL_CHARS} characters",
        ),
        "logit_bias": _LOGIT_BIAS,
        "ignore_eos": _flag(),
        "skip_special_tokens": _flag(),
        "user": Rule(
            accepts=lambda value: isinstance(value, str) and len(value) <= MAX_LABEL_CHARS,
            demand=f"must be a string of at most {MAX_LABEL_CHARS} characters",
        ),
        "response_format": _TEXT_FORMAT,
        **_REFUSED,
    }


def _whole(low: int, high: int, *, forwarded: bool = True) -> Rule:
    return Rule(
        accepts=lambda value: is_whole(value, low, high),
        demand=f"must be a whole number from {low} to {high}",
        forwarded=forwarded,
    )


def _number(low: float, high: float) -> Rule:
    return Rule(accepts=lambda value: _is_number(value, low, high), demand=f"must be a number from {low} to {high}")


def _flag() -> Rule:
    return Rule(accepts=lambda value: isinstance(value, bool), demand="must be true or false")


def _unsupported(*defaults: object) -> Rule:
    """Refuse everything but the defaults. The type counts too: to Python, false equals 0."""
    return Rule(
        accepts=lambda value: any(type(value) is type(default) and value == default for default in defaults),
        demand="is not supported: leave it out",
        code="unsupported_parameter",
        forwarded=False,
    )


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]  # false for not-a-number


def _is_labels(value: object, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(is_label(item) for item in value)


def _is_bias(token: str, bias: object) -> bool:
    return re.fullmatch("[0-9]{1,10}", token) is not None and int(token) <= MAX_TOKEN_ID and _is_number(bias, -100, 100)


_LOGIT_BIAS = Rule(
    accepts=lambda value: (
        isinstance(value, dict)
        and len(value) <= MAX_BIASED_TOKENS
        and all(_is_bias(token, bias) for token, bias in value.items())
    ),
    demand=f"must map at most {MAX_BIASED_TOKENS} token ids to numbers from -100 to 100",
)

_STREAM_OPTIONS = Rule(
    accepts=lambda value: (
        isinstance(value, dict) and all(isinstance(value.get(key), bool | None) for key in STREAM_OPTIONS)
    ),
    demand=f"must be an object whose {' and '.join(STREAM_OPTIONS)} are true or false",
)

_TEXT_FORMAT = Rule(
    accepts=lambda value: isinstance(value, dict) and value.get("type") == "text",
    demand='must be {"type": "text"}: structured output is not supported',
    code="unsupported_parameter",
    forwarded=False,
)

_REFUSED: Mapping[str, Rule] = {
    # Answers about the prompt, or a choice of tokens, that one request can use to harm others in the batch.
    "prompt_logprobs": _unsupported(),
    "allowed_token_ids": _unsupported(),
    "logits_processors": _unsupported([]),
    "repetition_detection": _unsupported(),
    "use_beam_search": _unsupported(False),
    # Structured output.
    "structured_outputs": _unsupported(),
    "guided_json": _unsupported(),
    "guided_json_object": _unsupported(False),
    "guided_regex": _unsupported(),
    "guided_choice": _unsupported(),
    "guided_grammar": _unsupported(),
    "guided_decoding_backend": _unsupported(),
    "guided_whitespace_pattern": _unsupported(),
    # The chat template is the server's.
    "chat_template": _unsupported(),
    "chat_template_kwargs": _unsupported({}),
    "documents": _unsupported([]),
    "add_generation_prompt": _unsupported(True),
    "continue_final_message": _unsupported(False),
    # Tools and other media than text.
    "tools": _unsupported([]),
    "tool_choice": _unsupported("none"),
    "functions": _unsupported([]),
    "function_call": _unsupported("none"),
    "modalities": _unsupported(["text"]),
    "audio": _unsupported(),
    "prompt_embeds": _unsupported(),
    "media_io_kwargs": _unsupported({}),
    "mm_processor_kwargs": _unsupported({}),
    # Scheduler, connector and identity are the server's.
    "kv_transfer_params": _unsupported({}),
    "ec_transfer_params": _unsupported({}),
    "cache_salt": _unsupported(),
    "priority": _unsupported(0),
    "vllm_xargs": _unsupported({}),
    "data_parallel_rank": _unsupported(),
    "request_id": _unsupported(),
    "session_id": _unsupported(),
}
