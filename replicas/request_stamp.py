"""What the ingress tells an engine's scheduler about a request: the API's `vllm_xargs`, `extra_args` in the engine.

Rules:
- Clients cannot set it: the ingress refuses the field, and forwards none that it does not know.
- Reading is total, for whoever runs the engine without the ingress may put anything there: a stamp that is none counts as
  no stamp.

What remains of a request that was predicted to have m tokens in the median and u at most (its 0.9-quantile), with n out:
    x - n tokens, with P(length > x) = 0.1 * P(length > n)
its 0.9-quantile, given that it has lasted. The length's distribution is taken to fall exponentially, to a half at m and
from there to a tenth at u:
    x = m + (u - m) * (1 + n / m * log 2 / log 5)    while n < m
    x = n + (u - m) * log 10 / log 5                 after that: the tail forgets
One that has outlived u is taken to last as long again as it has outlived it, at least (lengths have heavier tails than
that, and the prediction was wrong): n - u. Never less than 1, nor more than its limit leaves.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

TENANT, OUTPUT_TOKENS = "adaptivellm_tenant", "adaptivellm_output_tokens"
MAX_OUTPUT_TOKENS = 1 << 31

MORE_AT_MEDIAN = math.log(2) / math.log(5)


def make_stamp(*, tenant: str, median_tokens: int, upper_tokens: int) -> dict[str, str | list[int]]:
    """Return the stamp of a request.

    Args:
        median_tokens: Output tokens that it has with a probability of a half, at least 1.
        upper_tokens: Output tokens that it has at most, with a probability of 0.9.
    """
    assert 1 <= median_tokens <= upper_tokens < MAX_OUTPUT_TOKENS, f"{median_tokens} and {upper_tokens} tokens"
    return {TENANT: tenant, OUTPUT_TOKENS: [median_tokens, upper_tokens]}


def tenant_in(extra_args: Mapping[str, Any]) -> str:
    """The tenant; empty without a stamp."""
    return str(extra_args.get(TENANT, ""))


def remaining_tokens(extra_args: Mapping[str, Any], num_output_tokens: int, max_tokens: int) -> int:
    """Output tokens that are predicted to be still to come at most; without a stamp all that the limit leaves.

    For hundreds of requests in a step: comparisons instead of `min` and `max`, which take three times as long.
    """
    limit = max_tokens - num_output_tokens if max_tokens > num_output_tokens else 1
    stamp = extra_args.get(OUTPUT_TOKENS)
    if not _is_prediction(stamp):
        return limit
    median, upper = stamp
    if num_output_tokens < median:
        left = median + (upper - median) * (1.0 + MORE_AT_MEDIAN * num_output_tokens / median) - num_output_tokens
    else:
        left = (upper - median) * (1.0 + MORE_AT_MEDIAN)
    if left < num_output_tokens - upper:
        left = num_output_tokens - upper
    if left >= limit:
        return limit
    return math.ceil(left) if left > 1.0 else 1


def _is_prediction(stamp: Any) -> TypeGuard[list[int]]:
    return (
        type(stamp) is list
        and len(stamp) == 2
        and type(stamp[0]) is type(stamp[1]) is int
        and 1 <= stamp[0] <= stamp[1] < MAX_OUTPUT_TOKENS
    )
